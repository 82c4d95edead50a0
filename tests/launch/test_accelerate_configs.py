import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[2] / "launch" / "accelerate"


@pytest.mark.parametrize(
    ("name", "processes", "precision"),
    [("cpu_2ranks", 2, "no"), ("one_gpu", 1, "no"), ("8gpu_ddp_bf16", 8, "bf16")],
)
def test_accelerate_accepts_the_config(name, processes, precision):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (processes, precision)


@pytest.mark.multiprocess
def test_cpu_2ranks_starts_two_gloo_ranks():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_2ranks.yaml")]
    done = subprocess.run(
        [*command, "--main_process_port", "0", "-m", "world_size"],
        cwd=Path(__file__).parent,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 gloo cpu", "rank 1 of 2 gloo cpu"]
