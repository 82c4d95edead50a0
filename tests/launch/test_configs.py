"""The files of launch/, as `accelerate launch` and DeepSpeed read them, and started with gloo where that is possible.

test_zero.py starts the ZeRO files.
"""

import json
import re
import socket
import sys
import textwrap
from pathlib import Path

import pytest
import ranks
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from mgcc_dist.accelerate_launch import launch_command
from mgcc_dist.common.errors import UserError

LAUNCH = ranks.REPOSITORY / "launch"
CONFIGS = LAUNCH / "accelerate"
ZERO = {f"8gpu_zero{kind}": f"launch/deepspeed/zero{kind}.json" for kind in ("1", "2", "3", "3_offload")}
WORLD_SIZE = Path(__file__).with_name("world_size.py")


@pytest.mark.parametrize(
    ("name", "machines", "processes", "precision"),
    [
        ("cpu_2ranks", 1, 2, "no"),
        ("one_gpu", 1, 1, "no"),
        ("8gpu_ddp_bf16", 1, 8, "bf16"),
        ("4x8gpu_ddp_bf16", 4, 32, "bf16"),
        ("8gpu_fsdp2", 1, 8, "bf16"),
        *((name, 1, 8, "no") for name in ZERO),  # bf16 is set in DeepSpeed's file
    ],
)
def test_accelerate_reads_the_settings_in_the_file_name(name, machines, processes, precision, monkeypatch):
    monkeypatch.chdir(ranks.REPOSITORY)  # paths in the files are relative to it
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "mgcc_dist.ldm"]
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (read.num_machines, read.num_processes, read.mixed_precision) == (machines, processes, precision)
    assert (read.use_fsdp, read.use_deepspeed) == (name == "8gpu_fsdp2", name in ZERO)
    assert read.multi_gpu == (processes > 1 and not read.use_fsdp and not read.use_deepspeed)
    assert not read.use_cpu
    assert read.deepspeed_config_file == ZERO.get(name)


@pytest.mark.parametrize("name", [*ZERO, "one_gpu", "8gpu_ddp_bf16"])
def test_mgcc_launch_finds_a_file_by_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, *words = launch_command([name, "--main_process_port", "5000", "ldm", "--preset", "busi"])
    assert (python, words[:2]) == (sys.executable, ["-m", "accelerate.commands.launch"])
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert Path(read.config_file).samefile(CONFIGS / f"{name}.yaml")
    assert (read.module, read.training_script) == (True, "mgcc_dist.ldm")
    assert (read.training_script_args, read.main_process_port) == (["--preset", "busi"], 5000)
    if name in ZERO:
        assert Path(read.deepspeed_config_file).samefile(ranks.REPOSITORY / ZERO[name])


def test_a_launch_file_of_ones_own_is_used_as_it_is(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "{distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: my_zero.json}}"
    )
    words = launch_command([str(tmp_path / "mine.yaml"), "segment", "ldm"])
    assert words[3:] == ["--config_file", str(tmp_path / "mine.yaml"), "-m", "mgcc_dist.segment", "ldm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8gpu_zero4", "ldm"], r"launch 8gpu_zero4: no such launch file\. Did you mean 8gpu_zero"),
        (["8gpu_zero2", "sgment"], r"no program given\. Did you mean segment\? Add one of segment, ldm"),
        (["8gpu_zero2", "--preset", "busi"], r"launch 8gpu_zero2: no program given\. Add one of segment, ldm"),
        (
            [str(ranks.REPOSITORY / "configs/segment/mgcc_demo.yaml"), "ldm"],
            r"mgcc_demo\.yaml: is not a launch file of Accelerate",
        ),
    ],
)
def test_a_wrong_word_for_mgcc_launch_is_named(words, message):
    with pytest.raises(UserError, match=message):
        launch_command(words)


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {
        "cpu_2ranks",
        "one_gpu",
        "8gpu_ddp_bf16",
        "4x8gpu_ddp_bf16",
        "8gpu_fsdp2",
        *ZERO,
    }
    assert {f"launch/deepspeed/{path.name}" for path in (LAUNCH / "deepspeed").iterdir()} == set(ZERO.values())


def test_deepspeed_reads_the_settings_in_the_file_names():
    pytest.importorskip("deepspeed")
    printed = ranks.finish(ranks.forked(1), [Path(__file__).with_name("ask_deepspeed.py"), *ZERO.values()])
    read = json.loads(printed.splitlines()[-1])
    assert {name: (file["stage"], file["offload"]) for name, file in read.items()} == {
        "zero1.json": (1, [None, None]),
        "zero2.json": (2, [None, None]),
        "zero3.json": (3, [None, None]),
        "zero3_offload.json": (3, ["cpu", "cpu"]),
    }
    assert all(file["bf16"] for file in read.values())


@pytest.mark.multiprocess
def test_cpu_2ranks_starts_two_gloo_ranks():
    launcher = ranks.accelerate("--config_file", str(CONFIGS / "cpu_2ranks.yaml"))
    printed = ranks.finish(launcher, [WORLD_SIZE], ACCELERATE_USE_CPU="true")
    assert sorted(printed.splitlines()) == ["rank 0 of 2 gloo cpu", "rank 1 of 2 gloo cpu"]


@pytest.mark.multiprocess
def test_the_file_for_several_machines_joins_two_launchers():
    """Two machines with one rank each, instead of four with eight."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--config_file", str(CONFIGS / "4x8gpu_ddp_bf16.yaml"), "--num_machines", "2", "--num_processes", "2"]
    launcher = [*ranks.accelerate(*options), "--main_process_port", port, "--machine_rank"]
    other = ranks.start([*launcher, "1"], [WORLD_SIZE], ACCELERATE_USE_CPU="true")
    printed = ranks.finish([*launcher, "0"], [WORLD_SIZE], ACCELERATE_USE_CPU="true")
    other_printed, errors = other.communicate(timeout=60)
    assert other.returncode == 0, errors
    assert (printed, other_printed) == ("rank 0 of 2 gloo cpu\n", "rank 1 of 2 gloo cpu\n")


def test_the_memory_table_matches_the_output_of_its_command():
    pytest.importorskip("deepspeed")
    text = (LAUNCH / "README.md").read_text()
    [command] = re.findall(r"    python - <<'END'\n(.*?)    END\n", text, re.DOTALL)
    printed = ranks.finish(ranks.forked(1), ["-c", textwrap.dedent(command)]).splitlines()
    [counts] = [line for line in printed if "in the largest layer" in line]
    assert f"`{counts}`" in text

    options = {
        "zero2": "offload_optimizer=none",
        "zero3": "offload_param=none, offload_optimizer=none, zero_init=0",
        "zero3_offload": "offload_param=OffloadDeviceEnum.cpu, offload_optimizer=OffloadDeviceEnum.cpu, zero_init=0",
    }
    rows = [[part.strip() for part in line.split("|")] for line in printed if line.count("|") == 2]
    for name, option in options.items():
        (cpu, gpu, _), (_, of_four_nodes, _) = (row for row in rows if row[2] == option)
        cells = " | ".join(cell.removesuffix("GB") for cell in (gpu, of_four_nodes, cpu))
        assert f"| {name} | {cells} |" in text
