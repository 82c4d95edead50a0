from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from ranks import REPOSITORY, accelerate, finish

CONFIGS = REPOSITORY / "launch" / "accelerate"


@pytest.mark.parametrize(
    ("name", "processes", "precision"),
    [("cpu_2ranks", 2, "no"), ("one_gpu", 1, "no"), ("8gpu_ddp_bf16", 8, "bf16")],
)
def test_accelerate_accepts_the_config(name, processes, precision):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (processes, precision)


@pytest.mark.multiprocess
def test_cpu_2ranks_starts_two_gloo_ranks():
    launcher = accelerate("--config_file", str(CONFIGS / "cpu_2ranks.yaml"))
    printed = finish(launcher, [Path(__file__).with_name("world_size.py")], ACCELERATE_USE_CPU="true")
    assert sorted(printed.splitlines()) == ["rank 0 of 2 gloo cpu", "rank 1 of 2 gloo cpu"]
