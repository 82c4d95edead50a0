"""Threads of a program: all cores for one process, an equal share per rank for several, unless the user set them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from mgcc_dist.common.threads import SPIN_COUNT, configure_threads, is_program

PROBE = Path(__file__).with_name("threads_probe.py")
CORES = len(os.sched_getaffinity(0))
ONE_PROCESS = ranks.accelerate("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")


def probe(launcher):
    """Return what the started processes print, with no OpenMP variable set."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    words = [sys.executable, *launcher, str(PROBE)]
    done = subprocess.run(words, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def plain():
    """The output of a process without a launcher."""
    [shown] = probe([])
    return shown


def test_a_program_uses_all_cores_and_spins_for_a_bounded_time(plain):
    assert plain["GOMP_SPINCOUNT"] == SPIN_COUNT
    assert plain["OMP_NUM_THREADS"] is None
    assert 1 <= plain["threads"] <= CORES  # torch does not use hyperthreads


@pytest.mark.multiprocess
def test_accelerate_launch_with_one_process_uses_the_same_threads(plain):
    assert probe(ONE_PROCESS) == [plain]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("words", "expected"), [(["torchrun"], True), (["deepspeed.launcher.launch"], True), (["accelerate_all.sh"], False)]
)
def test_the_parent_is_a_launcher_by_its_name(words, expected):
    code = "from mgcc_dist.common.launcher import launcher_words; print(bool(launcher_words()))"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent, *words], capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_two_ranks_divide_the_cores():
    for shown in probe(ranks.torchrun(2)):
        assert shown["threads"] == max(1, CORES // 2)
        assert shown["GOMP_SPINCOUNT"] == SPIN_COUNT


NAMES = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "SUBMITIT_LOCAL_NTASKS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.fixture
def no_variables(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored, also where it was not set
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("options", "variables", "kept"),
    [
        ([], {}, False),
        ([], {"OMP_NUM_THREADS": "1"}, True),
        (["--num_cpu_threads_per_process", "1"], {}, True),
    ],
)
def test_one_thread_under_a_launcher_is_kept_only_if_the_user_set_it(
    options, variables, kept, no_variables, monkeypatch
):
    command = [sys.executable, "-Sc", "print(flush=True); input()", "accelerate", *options]  # looks like a launcher
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        launcher.stdout.readline()  # before, /proc may not have its command line yet
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        configure_threads()
        launcher.kill()
    assert ("OMP_NUM_THREADS" in os.environ) is kept


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "77"}, {"GOMP_SPINCOUNT": "77"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_variables_that_the_user_set_are_kept(variables, expected, no_variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configure_threads()
    shown = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert shown == variables | expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m mgcc_dist.segment --out x", True),
        ("python -X utf8 -u -m mgcc_dist --version", True),
        ("python /opt/bin/mgcc segment", True),
        ("python -u -m submitit.core._submit logs", True),
        ("python -m pytest tests", False),
        ("python train.py -m mgcc_dist", False),
        ("python", False),
    ],
)
def test_only_programs_set_threads_and_an_import_does_not(command, expected):
    assert is_program(command.split()) is expected
