"""Launchers: a process saves and exits when its launcher ends, and gets the options behind its name."""

import signal
import time

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from ranks import accelerate, start, torchrun
from torch.distributed.run import get_args_parser

from mgcc_dist import evaluate, ldm, segment
from mgcc_dist.common.command_line import read_command_line
from mgcc_dist.common.options import options_of
from mgcc_dist.inference.config import PredictConfig

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from mgcc_dist.common.errors import run_program

folder = Path(sys.argv[1])

def save(*_):
    (folder / f"saved-{os.getpid()}").touch()
    sys.exit(75)

def main():
    signal.signal(signal.SIGTERM, save)
    (folder / f"started-{os.getpid()}").touch()
    time.sleep(600)

run_program("test", main)
"""


@pytest.mark.parametrize(
    ("launcher", "ranks", "number"),
    [
        (accelerate("--cpu", "--num_processes", "1"), 1, signal.SIGTERM),
        (accelerate("--cpu", "--num_processes", "1"), 1, signal.SIGKILL),
        (torchrun(2), 2, signal.SIGKILL),
    ],
    ids=["accelerate-SIGTERM", "accelerate-SIGKILL", "torchrun-SIGKILL"],
)
def test_every_rank_saves_when_its_launcher_is_killed(tmp_path, launcher, ranks, number):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    process = start(launcher, [script, tmp_path])

    def wait_for(state):
        deadline = time.monotonic() + 300
        while len(found := sorted(tmp_path.glob(f"{state}-*"))) < ranks:
            assert time.monotonic() < deadline, f"only {found}"
            time.sleep(0.1)
        return {int(path.name.partition("-")[2]) for path in found}

    try:
        started = wait_for("started")
        process.send_signal(number)
        assert wait_for("saved") == started
    finally:
        for pid in [process.pid, *(int(path.name.partition("-")[2]) for path in tmp_path.glob("started-*"))]:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        process.wait()


@pytest.fixture(params=[get_args_parser, launch_command_parser], ids=["torchrun", "accelerate"])
def launcher(request):
    return request.param()


@pytest.mark.parametrize("program", [segment, ldm, evaluate])
def test_no_option_of_a_launched_program_is_read_by_its_launcher(launcher, program):
    """A launcher's parser refuses words that abbreviate several of its own options, wherever they stand."""
    names = [option.name for option in options_of(program.PROGRAM.default.config) if not option.positional]
    names += ["--config", "--preset", "--import", "--print_config", "--log-level", "--help", "--help-all"]
    for name in names:
        words = launcher.parse_args(["-m", f"mgcc_dist.{program.PROGRAM.name}", name, "value"])
        assert words.training_script_args == [name, "value"]


def test_two_dashes_end_the_options_of_a_launcher(launcher):
    """torchrun takes --run for an abbreviation of --run-path and --run_path."""
    words = launcher.parse_args(["-m", "mgcc_dist.predict", "--", "--run", "out/run", "--images", "a", "--out", "b"])
    for given in (words.training_script_args, ["--", *words.training_script_args]):  # some versions pass -- on
        [layer] = read_command_line(PredictConfig, given, None, None).layers
        assert layer.tree == {"run": "out/run", "images": ["a"], "out": "b"}
