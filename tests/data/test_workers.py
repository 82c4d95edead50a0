"""Worker processes: order, errors, signals and shutdown."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import torch

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.workers import load_in_order


def slow_and_uneven(number):
    time.sleep(random.random() / 100)
    return number, os.getpid()


def large(number):
    return number, os.getpid(), bytes(2**20)


def fails_at_three(number):
    if number == 3:
        raise BadFile(Path("x.png"), "not a readable image")
    return number


def has_a_bug_at_three(number):
    return 1 // (3 - number)


def thread_count(number):
    return torch.get_num_threads()


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_does_not_depend_on_the_number_of_workers(workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # PyTorch would warn of more workers than cores
    loaded = list(load_in_order(slow_and_uneven, range(20), workers))
    assert [number for number, _ in loaded] == list(range(20))
    pids = {pid for _, pid in loaded}
    assert len(pids) == max(workers, 1)
    assert (os.getpid() in pids) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_user_error_of_a_worker_is_raised_in_the_main_process(workers):
    loaded = load_in_order(fails_at_three, count(), workers)
    assert [next(loaded) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError) as error:
        next(loaded)
    assert str(error.value) == "x.png: not a readable image"


def test_other_errors_keep_their_traceback_and_workers_are_stopped():
    loaded = load_in_order(has_a_bug_at_three, count(), 2)
    with pytest.raises(ZeroDivisionError, match="has_a_bug_at_three"):
        list(loaded)
    assert torch.multiprocessing.active_children() == []


def test_workers_ignore_the_signals_that_stop_the_main_process():
    with closing(load_in_order(slow_and_uneven, count(), 2)) as loaded:
        before = {next(loaded)[1] for _ in range(6)}
        for pid in before:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(pid, number)
        after = [next(loaded) for _ in range(30)]
    assert {pid for _, pid in after} == before
    assert [number for number, _ in after] == list(range(6, 36))


def test_the_main_process_receives_signals_after_workers_are_started():
    received = []
    before = signal.signal(signal.SIGUSR2, lambda *_: received.append(1))
    try:
        with closing(load_in_order(slow_and_uneven, count(), 1)) as loaded:
            next(loaded)
            os.kill(os.getpid(), signal.SIGUSR2)
            next(loaded)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [1]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_workers_stop_with_the_iterator(how):
    loaded = load_in_order(slow_and_uneven, count(), 2)
    pids = {next(loaded)[1] for _ in range(6)}
    assert all(map(is_running, pids))
    if how == "close":
        loaded.close()
    else:
        del loaded
        gc.collect()
    assert not any(map(is_running, pids))


def test_workers_use_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(load_in_order(thread_count, range(4), 2)) == [1, 1, 1, 1]
    finally:
        torch.set_num_threads(threads)


def test_loading_does_not_change_the_global_random_state():
    """Otherwise losses would depend on the number of workers and on where a run was resumed."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load_in_order(thread_count, range(2), 1))
    assert torch.equal(torch.get_rng_state(), before)


LEFT_RUNNING = """
import sys, time
from itertools import count
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.workers import load_in_order
sys.path.insert(0, {tests!r})
from test_workers import {load}
loaded = load_in_order({load}, count(), 2)
print(*{{next(loaded)[1] for _ in range(6)}}, flush=True)
{end}
"""


def start(end, load="slow_and_uneven"):
    program = LEFT_RUNNING.format(tests=str(Path(__file__).parent), end=end, load=load)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_program_that_leaves_its_loader_open_still_exits():
    """Python joins remaining workers at exit, and these ignore SIGTERM."""
    process = start("1 / 0")
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert not any(map(is_running, out.split()))


def test_workers_of_a_killed_program_exit_also_while_they_wait_to_hand_over_a_result():
    process = start("time.sleep(600)", "large")
    pids = process.stdout.readline().split()
    assert len(pids) == 2
    process.kill()
    process.wait()
    for _ in range(300):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.1)
    pytest.fail("workers are still running")
