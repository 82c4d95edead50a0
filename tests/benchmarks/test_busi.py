"""Table I within a time: the order of the runs, and how a run is stopped; and the child process with a deadline."""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil
import pytest

from benchmarks.busi import select_runs, train
from benchmarks.processes import Child, raise_on_sigterm
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import EXIT_STOPPED, UserError
from mgcc_dist.sweep.expansion import read_sweep


def test_u_net_and_mgcc_of_the_first_split_come_first_and_rows_can_be_selected():
    runs = read_sweep(CONFIGS / "sweeps" / "table_1.yaml").runs
    assert [(run.row, run.seed) for run in select_runs(runs)[:3]] == [("U-Net", 1), ("MGCC", 1), ("CMU-Net", 1)]
    assert [run.seed for run in select_runs(runs)] == sorted([1, 2, 3] * 9)
    assert {run.dataset for run in select_runs(runs)} == {"BUSI"}
    selected = select_runs(runs, rows=["MGCC", "U-Net"], seeds=[2])
    assert [(run.row, run.seed) for run in selected] == [("U-Net", 2), ("MGCC", 2)]
    with pytest.raises(UserError, match="--rows: the sweep has no row V-Net on BUSI"):
        select_runs(runs, rows=["V-Net"])


@pytest.fixture
def handlers():
    """Python's handler of SIGINT, which a background job of a shell script lacks, and the one for SIGTERM."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    raise_on_sigterm()
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.fixture
def saving_run(tmp_path):
    """A command that saves itself on SIGTERM, as a training run does."""
    code = f"""
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(0.2)
    Path("{tmp_path}/saved").touch()
    sys.exit({EXIT_STOPPED})
signal.signal(signal.SIGTERM, stop)
Path("{tmp_path}/started").touch()
time.sleep(60)
"""
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_forwarded_and_the_run_can_save_itself(number, tmp_path, handlers, saving_run):
    def send():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt):
        train(saving_run, time.monotonic() + 60)
    assert (tmp_path / "saved").exists()


def test_a_run_is_stopped_at_the_deadline_and_not_started_after_it(tmp_path, saving_run):
    assert train(saving_run, time.monotonic() + 3) == EXIT_STOPPED
    assert (tmp_path / "saved").exists()
    assert train(["sleep", "60"], time.monotonic() + 0.2) == EXIT_STOPPED  # it had no handler yet
    assert train(["false"], time.monotonic() - 1) == EXIT_STOPPED
    assert train(["false"], time.monotonic() + 60) == 1


def test_a_child_with_its_own_session_leaves_no_processes_behind(tmp_path):
    pid = tmp_path / "pid"
    child = Child(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], seconds=1, grace=1, log=tmp_path / "log")
    child.wait()
    assert child.timed_out
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(int(pid.read_text()))
        while left.status() != psutil.STATUS_ZOMBIE:  # nobody waits for it
            assert time.monotonic() < child.deadline + 30
            time.sleep(0.01)
