"""Only one process at a time uses an output folder."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from accelerate import Accelerator

from mgcc_dist import ldm, segment
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.lock import lock, lock_folder

HOLD = """
import sys, time, pathlib
from accelerate import Accelerator
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.lock import lock_folder
def main():
    lock_folder(pathlib.Path(sys.argv[1]), Accelerator(cpu=True))
    print("locked", flush=True)
    if sys.argv[2:]:
        time.sleep(600)
run_program("hold", main)
"""


def start(folder, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_second_process_gets_one_line_and_a_killed_holder_is_no_obstacle(tmp_path, accelerator):
    folder = tmp_path / "run"
    holder = start(folder, "hold")
    assert holder.stdout.readline() == "locked\n"
    try:
        second = start(folder)
        output, errors = second.communicate(timeout=300)
        assert (second.returncode, output) == (2, "")
        who = f"pid {holder.pid} on {socket.gethostname()}"
        (line,) = errors.splitlines()
        assert line.startswith(f"hold: {folder}: is in use by another process ({who}")
        for program in (segment, ldm):
            with pytest.raises(UserError, match=f"in use by another process .pid {holder.pid} "):
                program.main(["--out", str(folder)])
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    lock_folder(folder, accelerator)
    lock_folder(folder, accelerator)  # again in the same process
    blocked = start(folder)
    assert f"pid {os.getpid()} " in blocked.communicate(timeout=300)[1]
    assert blocked.returncode == 2


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """An orphaned DataLoader worker must not block the next start."""
    script = HOLD.replace("    if sys.argv[2:]:\n", "    import os\n    if os.fork() == 0:\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert parent.stdout.readline() == b"locked\n"
        assert parent.wait(timeout=300) == 0
        lock_folder(tmp_path, Accelerator(cpu=True))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the forked child


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
