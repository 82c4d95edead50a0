"""DeepSpeed's ZeRO and FSDP2 as launch/ starts them: two real ranks, compared with one rank without shards.

They run on forked ranks with the environment that `accelerate launch` sets. ZeRO-1 shards a part of what ZeRO-2 shards.
"""

import importlib.util
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import toy_ldm
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.ldm import run as run_here
from mgcc_dist.train.config import AdamWConfig, LoopConfig
from mgcc_dist.train.launch_settings import apply_launch_settings
from mgcc_dist.train.weights import deepspeed_precision

LAUNCH = ranks.REPOSITORY / "launch"

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

# 13 validation images: four batches of two on rank 0 and three on rank 1, which must gather its layers in step.
OPTIONS = ["--data.phantom", "42", "--audit.enabled", "false", "--quality.enabled", "false"]


def run(launcher: ranks.Launcher, out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    config = out.parent / "toy.yaml"
    config.write_text(toy_ldm.config(steps=4, checkpoint_every=2, samples=2))
    words = ["-m", "mgcc_dist.ldm", "--config", str(config), "--out", str(out), *OPTIONS, *words]
    return ranks.run(launcher, words, **variables)


def zero_options(stage: int, folder: Path, count: int = 2) -> list[str]:
    """The shipped files on `count` ranks, without ZeRO-3's exception for small tensors: here all tensors are small."""
    settings = json.loads((LAUNCH / "deepspeed" / f"zero{stage}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    shipped = str(LAUNCH / "accelerate" / f"8gpu_zero{stage}.yaml")
    return ["--config_file", shipped, "--num_processes", str(count), "--deepspeed_config_file", str(path)]


def launched_environment(options: list[str]) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for its ranks."""
    words = ["--main_process_port", "0", *options, "program.py"]
    received = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "deepspeed_launcher", received.append)
        patch.setattr(launch, "multi_gpu_launcher", received.append)
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    [read] = received
    environment = prepare_deepspeed_cmd_env(read)[1] if read.use_deepspeed else prepare_multi_gpu_env(read)
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def fsdp_environment() -> dict[str, str]:
    """The shipped file on two ranks, with a limit at which the toy's larger blocks are sharded each on their own."""
    options = ["--config_file", str(LAUNCH / "accelerate" / "8gpu_fsdp2.yaml"), "--num_processes", "2"]
    options += ["--mixed_precision", "no", "--fsdp_min_num_params", "1000"]
    return launched_environment(options) | {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The denoiser of one rank without ZeRO that accumulates the batches of two."""
    out = tmp_path_factory.mktemp("one") / "ldm"
    accumulate = ["--autoencoder.loop.accumulation", "2", "--denoiser.loop.accumulation", "2"]
    done = run(ranks.forked(1), out, *accumulate)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "denoiser"


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    """A ZeRO stage, the folder of a run with it, and the run's log."""
    stage, out = request.param, tmp_path_factory.mktemp("zero") / "ldm"
    done = run(ranks.forked(2), out, **launched_environment(zero_options(stage, out.parent)))
    assert done.returncode == 0, done.stderr[-3000:]
    return stage, out, done.stderr


WRITE_ENVIRONMENT = """
import json, os, sys
with open(f"{sys.argv[1]}/{os.environ['RANK']}.env", "w") as file:
    json.dump(dict(os.environ), file)
"""


def test_accelerate_launch_starts_ranks_with_the_environment_of_these_tests(tmp_path):
    options = zero_options(3, tmp_path)
    program = tmp_path / "environment.py"
    program.write_text(WRITE_ENVIRONMENT)
    ranks.finish(ranks.accelerate(*options), [program, tmp_path])
    environments = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.env"))]
    assert [(each["RANK"], each["WORLD_SIZE"]) for each in environments] == [("0", "2"), ("1", "2")]
    expected = launched_environment(options)
    assert expected["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(tmp_path / "zero3.json")
    for environment in environments:
        assert {key: environment.get(key) for key in expected} == expected


def assert_same_exports(denoiser: Path, one_rank: Path) -> None:
    for kind in ("best", "last"):
        averages, expected = (load_file(f / kind / "model.safetensors") for f in (denoiser, one_rank))
        assert averages.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(averages[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{kind} {name}")


@pytest.mark.parametrize("two_ranks", [2, 3], indirect=True)
def test_zero_on_two_ranks_exports_the_average_of_one_rank(two_ranks, one_rank):
    stage, out, log = two_ranks
    assert "world size 2 (DEEPSPEED), device cpu, precision no" in log
    assert f'"zero_stage": {stage}' in (next((out / "denoiser").glob("checkpoints/*/state.json"))).read_text()
    assert_same_exports(out / "denoiser", one_rank)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out / "denoiser", one_rank))
    assert ours["parameters"] == theirs["parameters"]
    assert ours["best"]["loss"] == pytest.approx(theirs["best"]["loss"], rel=1e-3)


def back_to_step_2(denoiser: Path) -> None:
    """Leave what a run that was stopped after step 2 of 4 leaves."""
    (denoiser / "result.json").unlink()
    shutil.rmtree(denoiser / "last")
    shutil.rmtree(denoiser / "checkpoints" / "step-00000004")


@pytest.mark.parametrize("two_ranks", [2, 3], indirect=True)
def test_zero_resumes_on_another_number_of_ranks(two_ranks, one_rank):
    """Through DeepSpeed's universal checkpoint; without ZeRO it is refused."""
    stage, out, _ = two_ranks
    back_to_step_2(out / "denoiser")
    done = run(ranks.forked(1), out, **launched_environment(zero_options(stage, out.parent, count=1)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved by 2 ranks, converting it for 1" in done.stderr
    assert "accumulating 2 batches of 2 per rank instead of 1" in done.stderr
    assert_same_exports(out / "denoiser", one_rank)
    assert not (out / "denoiser" / "checkpoints" / ".universal").exists()
    (out / "denoiser" / "result.json").unlink()
    words = ["--config", str(out.parent / "toy.yaml"), "--out", str(out), *OPTIONS]
    with pytest.raises(
        UserError,
        match=rf"was saved with ZeRO-{stage} and can't be loaded with full weights per rank\. Resume it with the same",
    ):
        run_here(parse(LdmConfig, words, CONFIGS / "ldm", "demo"))


def test_fsdp2_on_two_ranks_trains_and_resumes_to_the_average_of_one_rank(tmp_path, one_rank):
    out = tmp_path / "ldm"
    done = run(ranks.forked(2), out, **fsdp_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world size 2 (FSDP), device cpu" in done.stderr
    assert_same_exports(out / "denoiser", one_rank)
    back_to_step_2(out / "denoiser")
    done = run(ranks.forked(2), out, **fsdp_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from step 2 of 4" in done.stderr
    assert_same_exports(out / "denoiser", one_rank)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_validation_and_export_do_not_gather_the_network_on_every_rank(kind, tmp_path):
    environment = fsdp_environment() if kind == "fsdp2" else launched_environment(zero_options(3, tmp_path))
    printed = ranks.finish(ranks.forked(2), [Path(__file__).with_name("shard_memory.py")], **environment)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    first, second = sorted(rows, key=lambda row: row["rank"])
    assert max(first["validation"], second["validation"], second["export"]) < 0.5 * first["network"]
    assert first["export"] > 0.9 * first["network"], "only rank 0 holds the network"


def launched(**settings):
    """An accelerator as a DeepSpeed file with these settings gives."""
    file = json.loads((LAUNCH / "deepspeed" / "zero3_offload.json").read_text()) | settings
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config=file))
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state, num_processes=2)


LOADER = SimpleNamespace(batch=8)


@pytest.mark.parametrize(
    ("enabled", "mixed_precision", "expected"),
    [(True, "no", "bf16"), ("auto", "bf16", "bf16"), ("auto", "no", "no"), (False, "bf16", "no")],
)
def test_precision_of_the_weights_is_that_of_the_deepspeed_file(enabled, mixed_precision, expected):
    accelerator = launched(bf16={"enabled": enabled})
    accelerator.mixed_precision = mixed_precision
    assert deepspeed_precision(accelerator) == expected


def test_sgd_with_offload_is_refused():
    """Accelerate would silently train with Adam instead."""
    accelerator = launched()
    with pytest.raises(
        UserError, match=r"loop\.optimizer is sgd, but .* adam or adamw, or a launch file without offload"
    ):
        apply_launch_settings("segment", LOADER, LoopConfig(steps=1), accelerator)
    apply_launch_settings("segment", LOADER, LoopConfig(steps=1, optimizer=AdamWConfig()), accelerator)
    assert accelerator.state.deepspeed_plugin.deepspeed_config["train_batch_size"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            r"gradient_accumulation_steps 4, but denoiser\.loop\.accumulation is 2\. Set",
        ),
        (
            {"gradient_clipping": 1.0},
            r"gradient_clipping 1\.0, but denoiser\.loop\.clip_norm is 0\.5\. Set .* to 1, or",
        ),
        ({"train_micro_batch_size_per_gpu": 2}, r"train_micro_batch_size_per_gpu 2, but the batch size is 8"),
        ({"train_batch_size": 8}, r"train_batch_size 8, but the global batch size is 32"),
        ({"optimizer": {"type": "Adam"}}, r"section 'optimizer'\. Remove it, and set denoiser\.loop\.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, r"section 'scheduler'\. Remove it, and set denoiser\.loop\.schedule"),
    ],
)
def test_deepspeed_file_that_asks_for_other_settings_than_the_config_is_refused(settings, message):
    """They were replaced silently."""
    config = LoopConfig(steps=1, optimizer=AdamWConfig(), accumulation=2, clip_norm=0.5)
    with pytest.raises(UserError, match=f"^denoiser: the launch.*{message}"):
        apply_launch_settings("denoiser", LOADER, config, launched(**settings))


def test_deepspeed_file_that_agrees_with_the_config_is_taken_also_by_the_next_task():
    accelerator = launched(gradient_accumulation_steps=2, gradient_clipping=0.5, train_batch_size="auto")
    config = LoopConfig(steps=1, optimizer=AdamWConfig(), accumulation=2, clip_norm=0.5)
    for task in ("autoencoder", "denoiser"):
        apply_launch_settings(task, LOADER, config, accelerator)
    with pytest.raises(UserError, match=r"gradient_clipping 0\.5, but denoiser\.loop\.clip_norm is 0\."):
        apply_launch_settings("denoiser", LOADER, replace(config, clip_norm=0), accelerator)


def test_accumulation_that_the_launcher_asks_for_is_taken_or_refused(monkeypatch):
    """Accelerate took it instead of loop.accumulation, and the loop counted other steps than the optimizer."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UserError, match=r"^segment: .*accumulation_steps 4, but loop\.accumulation is 1"):
        apply_launch_settings("segment", LOADER, LoopConfig(steps=1), accelerator)
    apply_launch_settings("segment", LOADER, LoopConfig(steps=1, accumulation=4), accelerator)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    apply_launch_settings("segment", LOADER, LoopConfig(steps=1, accumulation=2), accelerator)
    assert accelerator.gradient_accumulation_steps == 2


def test_option_on_the_launchers_command_line_is_refused_in_one_line(tmp_path):
    """Without DeepSpeed `accelerate launch` drops it."""
    launcher = ranks.accelerate("--num_processes", "1", "--gradient_accumulation_steps", "3")
    done = run(launcher, tmp_path / "out")
    assert "gradient_accumulation_steps 3, but autoencoder.loop.accumulation is 1. Set" in done.stderr
    assert not (tmp_path / "out" / "autoencoder" / "last").exists()
