"""Only one process at a time uses an output folder."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import time

import pytest
from accelerate import Accelerator

from mgcc_dist import ldm, segment
from mgcc_dist.common import lock as module
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.lock import lock, lock_folder

FORK = multiprocessing.get_context("fork")


def lock_and_wait(folder, connection):
    """Say whether this process gets the lock, and hold it."""
    module._held.clear()  # what the parent holds, this process does not
    try:
        lock(folder)
    except UserError as error:
        connection.send(str(error))
    else:
        connection.send("locked")
        time.sleep(600)


def start(folder):
    """Lock `folder` in another process: return that, and what it says."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=lock_and_wait, args=(folder, there))
    process.start()
    return process, here.recv()


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_second_process_is_refused_and_a_killed_holder_is_no_obstacle(tmp_path, accelerator):
    folder = tmp_path / "run"
    holder, said = start(folder)
    assert said == "locked"
    try:
        who = f"pid {holder.pid} on {socket.gethostname()}"
        assert start(folder)[1].startswith(f"{folder}: is in use by another process ({who}")
        for program in (segment, ldm):
            with pytest.raises(UserError, match=f"in use by another process .pid {holder.pid} "):
                program.main(["--out", str(folder)])
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.join()
    lock_folder(folder, accelerator)
    lock_folder(folder, accelerator)  # again in the same process
    assert f"pid {os.getpid()} " in start(folder)[1]


def test_a_restarted_slurm_job_takes_over_from_its_start_on_a_node_that_was_taken_for_dead(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "SLURM_WAIT", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder, said = start(tmp_path)
    assert said == "locked"
    try:
        for job, restarts in (("12", "0"), ("13", "1")):  # a second process of the same start, and another job
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            with pytest.raises(UserError, match=f"in use by another process .pid {holder.pid} .* job 12, restart 0"):
                lock(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        lock(tmp_path)
        assert f"taken over from an earlier start of this job (pid {holder.pid} on " in caplog.text
    finally:
        holder.kill()
        holder.join()


def lock_and_leave_a_worker(folder):
    os.setsid()
    lock(folder)
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """An orphaned DataLoader worker must not block the next start."""
    parent = FORK.Process(target=lock_and_leave_a_worker, args=(tmp_path,))
    parent.start()
    parent.join()
    try:
        assert parent.exitcode == 0
        assert (tmp_path / ".lock").read_text().startswith(f"pid {parent.pid} ")
        lock(tmp_path)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the worker


def test_file_system_without_locks_gives_a_warning(tmp_path, accelerator, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    lock_folder(tmp_path, accelerator)
    assert f"{tmp_path}: its file system supports no locks (No locks available). Make sure that only one" in caplog.text


def test_a_folder_that_was_removed_since_is_created_and_locked_again(tmp_path):
    lock(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    lock(tmp_path / "out")
    assert (tmp_path / "out" / ".lock").read_text().startswith(f"pid {os.getpid()} ")
