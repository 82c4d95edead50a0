"""The shipped Accelerate configs: each is read by Accelerate itself, and the CPU one really starts two ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

LAUNCH = Path(__file__).parents[2] / "launch" / "accelerate"
RANKS = {"cpu_2ranks": 2, "one_gpu": 1, "ddp_8gpu_bf16": 8}


def test_every_config_is_expected_here():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == RANKS.keys()


@pytest.mark.parametrize("name", RANKS)
def test_accelerate_reads_the_config(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == RANKS[name]


@pytest.mark.multiprocess
def test_cpu_config_starts_two_gloo_ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu_2ranks.yaml")]
    done = subprocess.run(
        [*launcher, "--main_process_port", port, str(Path(__file__).with_name("say_world.py"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0: world size 2 (MULTI_CPU), sum of ranks 1",
        "rank 1: world size 2 (MULTI_CPU), sum of ranks 1",
    ]
