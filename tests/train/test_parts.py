"""Parts of the training loop: signals, EMA, metrics logger, run folder, seeds."""

import json
import os
import re
import signal
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from mgcc_dist.common import environment
from mgcc_dist.common.distributed import describe, seed_step
from mgcc_dist.common.environment import Source
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.common.options import data_input, neutral
from mgcc_dist.common.signals import StopSignal
from mgcc_dist.data.splits import locate_split
from mgcc_dist.train import run_folder, saved_run
from mgcc_dist.train.config import OPTIMIZERS, AdamConfig, AdamWConfig, LoopConfig, OptimizerConfig, SGDConfig
from mgcc_dist.train.ema import Ema
from mgcc_dist.train.loop import _optimizer
from mgcc_dist.train.metrics_logger import MetricsLogger, read_rows
from mgcc_dist.train.weights import gather_on_read, meta_copy


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize(
    ("number", "job", "repeatable"),
    [
        (signal.SIGTERM, "", False),
        (signal.SIGTERM, "12", True),  # sent to all processes of a job step, and forwarded by a container's runtime
        (signal.SIGINT, "12", False),
        (signal.SIGUSR2, "", True),
    ],
)
def test_a_signal_is_recorded_and_handlers_are_restored(number, job, repeatable, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.received_on_any_rank()
        os.kill(os.getpid(), number)
        assert stop.received_on_any_rank()
        assert stop.received == number.name
        assert (signal.getsignal(number) == signal.SIG_DFL) != repeatable
    assert signal.getsignal(number) == before


@dataclass(frozen=True)
class RMSpropConfig(OptimizerConfig):
    """RMSprop, as a plugin's optimizer."""

    name: str = "rmsprop"
    alpha: float = 0.9


@pytest.mark.parametrize(
    ("config", "kind", "keys"),
    [
        (SGDConfig(weight_decay=0.5, momentum=0.3), torch.optim.SGD, {"weight_decay": 0.5, "momentum": 0.3}),
        (AdamConfig(weight_decay=0.5), torch.optim.Adam, {"weight_decay": 0.5, "decoupled_weight_decay": False}),
        (AdamWConfig(), torch.optim.AdamW, {"weight_decay": 1e-4}),
        (RMSpropConfig(alpha=0.8), torch.optim.RMSprop, {"weight_decay": 1e-4, "alpha": 0.8}),
    ],
)
def test_an_optimizer_gets_the_keys_of_its_config(monkeypatch, config, kind, keys):
    monkeypatch.setattr(OPTIMIZERS, "_components", dict(OPTIMIZERS._components))
    OPTIMIZERS.register(RMSpropConfig, torch.optim.RMSprop)
    optimizer = _optimizer(nn.Linear(2, 2), LoopConfig(steps=1, learning_rate=0.7, optimizer=config), fused=False)
    assert type(optimizer) is kind
    assert keys | {"lr": 0.7} == {key: optimizer.defaults[key] for key in (*keys, "lr")}


def test_ema_follows_its_formula_and_restores_the_weights():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    trained = list(module.parameters())
    ema = Ema(trained, decay=0.5)
    expected = [parameter.detach().clone() for parameter in module.parameters()]
    for n in range(12):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module(torch.randn(8, 3, dtype=torch.float64))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, module.parameters(), strict=True)]
    before = [parameter.detach().clone() for parameter in trained]
    with ema.applied():
        for e, a in zip(expected, trained, strict=True):
            torch.testing.assert_close(a.detach(), e)
        assert module[1].num_batches_tracked == 12
    assert all(map(torch.equal, before, trained))


def test_a_layer_gathers_its_parameters_when_it_runs_and_frees_them():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    copy, alive, most = meta_copy(network), [], []
    sources = dict(zip(map(id, copy.parameters()), network.parameters(), strict=True))

    def gather(placeholder):
        full = sources[id(placeholder)].detach().clone()
        alive.append(weakref.ref(full))
        most.append(sum(each() is not None for each in alive))
        return full

    gather_on_read(copy, gather)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(copy(images), network(images), rtol=0, atol=0)
    assert len(alive) == 6
    assert max(most) == 2  # weight and bias
    assert [id(parameter) for parameter in copy.parameters()] == list(sources), "placeholders gather nothing"


def test_a_resumed_logger_drops_rows_after_its_checkpoint_and_a_truncated_line(tmp_path, accelerator):
    logger = MetricsLogger("t", tmp_path, 0, 10, accelerator)
    for step in range(1, 6):
        logger.write("train", step, step / 5, {"loss": 0.1 * step}, seconds=1.0)
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    MetricsLogger("t", tmp_path, 3, 10, accelerator).close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2] == {"step": 3, "epoch": 0.6, "split": "train", "loss": pytest.approx(0.3), "seconds": 1.0}


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    workers: int = neutral(2)


@dataclass(frozen=True)
class Config:
    data: Inner
    out: str = neutral("here")


def test_a_run_folder_of_another_config_is_refused_and_the_key_is_named(tmp_path, accelerator):
    run_folder.open_run_folder(tmp_path, Config(Inner(rate=0.3)), accelerator)  # no checkpoint was saved
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    run_folder.open_run_folder(tmp_path, Config(Inner(workers=7), out="there"), accelerator)
    with pytest.raises(UserError, match=r"data\.rate = 0\.1, not 0\.2"):
        run_folder.open_run_folder(tmp_path, Config(Inner(rate=0.2)), accelerator)


@dataclass(frozen=True)
class OnData:
    shards: str = data_input()
    split: str = data_input()
    out: str = neutral("here")


@pytest.mark.parametrize("finished", [True, False])
def test_data_that_was_moved_is_recognised_by_its_content(tmp_path, accelerator, finished):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("{}")
    run, (a, b) = tmp_path / "run", (OnData(str(tmp_path / name), "busi_random_1") for name in "ab")
    run_folder.open_run_folder(run, a, accelerator)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    inputs = {"inputs": run_folder.hash_inputs([tmp_path / "a" / "index.json", locate_split("busi_random_1")])}
    write_json(run / ("result.json" if finished else "checkpoints/step-00000001/state.json"), inputs)
    run_folder.open_run_folder(run, b, accelerator)
    (tmp_path / "b" / "index.json").write_text('{"other": 1}')
    run_folder.open_run_folder(run, a, accelerator)
    with pytest.raises(UserError, match=r"run: holds a run with shards = .*/a, not .*/b\. Choose another --out"):
        run_folder.open_run_folder(run, b, accelerator)
    with pytest.raises(UserError, match="holds a run with split = busi_random_1, not busi_random_2"):
        run_folder.open_run_folder(run, replace(a, split="busi_random_2"), accelerator)


def test_a_run_is_finished_when_its_result_exists_and_a_damaged_result_is_named(tmp_path, accelerator):
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    assert not saved_run.is_finished(tmp_path)
    run_folder.write_result(tmp_path, {"program": "segment"}, accelerator)
    assert saved_run.is_finished(tmp_path)
    result = saved_run.read_result(tmp_path)
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["world_size"] == 1
    for damaged in (json.dumps(result)[:-9], "[1]", "{}", "", "7"):
        (tmp_path / "result.json").write_text(damaged)
        with pytest.raises(UserError, match=r"result\.json: is damaged \(.*\)\. Move it elsewhere and rerun the run"):
            saved_run.read_result(tmp_path)


@pytest.mark.parametrize("content", [b"\0{: garbage", b"- 1\n", b"", b"\xff"])
def test_a_damaged_config_is_named_in_one_line(tmp_path, accelerator, content):
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: is damaged \(.*\)\. Restore it, or choose") as raised:
        run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["checkpoint", "result"])
def test_a_run_without_its_config_is_never_continued_as_another_run(tmp_path, accelerator, kind):
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    if kind == "checkpoint":
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    else:
        run_folder.write_result(tmp_path, {"program": "segment"}, accelerator)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml: does not exist, but .* holds checkpoints or a result"):
        run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("content", [b"[{", b"\xff", b'{"a": 1}', b"[1]"])
def test_a_damaged_record_of_starts_is_kept_aside_and_stops_no_run(tmp_path, accelerator, content):
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "environment.json").write_bytes(content)
    run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)
    [start] = json.loads((tmp_path / "environment.json").read_text())
    assert start["versions"]["torch"] == torch.__version__
    assert (tmp_path / "environment.json.damaged").read_bytes() == content


def test_damaged_lines_of_the_metrics_are_left_out_and_the_others_kept(tmp_path):
    lines = [
        b'{"step": 1}',
        b"\xff\0",
        b'{"step": 2}',
        b"[1]",
        b'"x"',
        b'{"loss": 1}',
        b'{"step": 3}',
        b'{"step": 4, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a file. Give a folder."), ("/x", "can't be created (Not a dir")]
)
def test_an_output_folder_that_cannot_be_created_is_refused(tmp_path, accelerator, name, message):
    (tmp_path / "file").touch()
    out = Path(f"{tmp_path / 'file'}{name}")
    with pytest.raises(UserError, match=re.escape(f"--out {out}: {message}")):
        run_folder.open_run_folder(out, Config(Inner()), accelerator)


def test_a_result_lists_starts_on_other_hosts_or_sources_and_the_diff_is_saved(tmp_path, accelerator, monkeypatch):
    def start(commit, node, job, diff=b""):
        monkeypatch.setattr(run_folder, "source", lambda: Source(commit, diff))
        monkeypatch.setattr(environment, "source", lambda: Source(commit, diff))
        monkeypatch.setattr(environment.socket, "gethostname", lambda: node)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        run_folder.open_run_folder(tmp_path, Config(Inner()), accelerator)

    start("aaa", "n0", "6")  # failed before its first checkpoint, so it is not part of the run
    (tmp_path / "config.yaml").unlink()
    start("abc", "n1", "7")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    start("abc", "n1", "8")
    start("abc+", "n2", "9", diff=b"-a\n+b\n")
    start("abc+", "n2", "9", diff=b"x" * (run_folder.DIFF_LIMIT + 1))
    start("abc+", "n2", "10", diff=b"-a\n+b\n")
    run_folder.write_result(tmp_path, {"program": "segment"}, accelerator)
    start("def", "n3", "11")  # a finished run is not started again
    last = saved_run.read_result(tmp_path)["environment"]
    seen = [(each["commit"], each["node"], each["slurm"]["job"]) for each in (*last["earlier"], last)]
    assert seen == [("abc", "n1", "8"), ("abc+", "n2", "9"), ("abc+", "n2", "10")]
    assert last["nodes"] == {"n2": [last["device"]]}
    (kept,) = tmp_path.glob("changes-*.diff")
    assert kept.read_bytes() == b"-a\n+b\n"
    assert last["changes"]["diff_sha256"].startswith(kept.stem.removeprefix("changes-"))


def test_randomness_of_a_step_depends_only_on_seed_step_and_batch():
    def draw(seed, step, batch):
        seed_step(seed, step, batch)
        return torch.rand(4)

    first = draw(1, 5, 0)
    torch.rand(100)
    assert torch.equal(draw(1, 5, 0), first)
    assert not torch.equal(draw(1, 6, 0), first)
    assert not torch.equal(draw(2, 5, 0), first)
    assert not torch.equal(draw(1, 5, 1), first)
    assert not torch.equal(draw(1, 5, 2), draw(1, 5, 1))


@pytest.mark.parametrize(
    ("has_instructions", "expected"), [(True, "precision bf16"), (False, "precision bf16 (emulated")]
)
def test_emulated_bfloat16_is_reported(monkeypatch, has_instructions, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    cpu = torch.device("cpu")
    accelerator = SimpleNamespace(
        device=cpu, mixed_precision="bf16", num_processes=1, distributed_type=DistributedType.NO
    )
    line = describe(accelerator)
    assert expected in line
    assert ("emulated" in line) is not has_instructions
    assert line.startswith("world size 1, device cpu")
