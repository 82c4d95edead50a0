import fcntl
import os
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTBED = Path(__file__).parents[2] / "slurm" / "testbed"


def pytest_configure(config):
    config.addinivalue_line("markers", "slurm: runs on the Slurm of slurm/testbed (root on Debian or Ubuntu)")


def is_in_use(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_base_port():
    """Return the first of five free ports."""
    for base in range(17300, 19300, 5):
        if not any(is_in_use(port) for port in range(base, base + 5)):
            return base
    pytest.skip("no free ports for a Slurm")


@pytest.fixture
def slurm_up(testbed):
    """Return the state folder of a running two-node Slurm; cancel what a failed test leaves in its queue."""
    yield testbed
    subprocess.run(["scancel", "--me"], check=False, timeout=60)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory):
    """Start a two-node Slurm for the session, with SLURM_CONF set."""
    with running_testbed(tmp_path_factory) as state:
        yield state


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory):
    """Start a Slurm of four nodes, each in a network namespace of its own, with SLURM_CONF set."""
    with running_testbed(tmp_path_factory, "--namespaces", "4") as state:
        yield state


@contextmanager
def running_testbed(tmp_path_factory, *options):
    if os.geteuid() != 0:
        pytest.skip("the Slurm testbed needs root")
    if not Path("/etc/debian_version").exists():
        pytest.skip("the Slurm testbed needs Debian or Ubuntu")
    state = tmp_path_factory.mktemp("slurm")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "slurm.lock").open("w") as lock:  # two would install packages, and take ports, at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [TESTBED / "up", "--state", state, "--port", str(free_base_port()), *options]
        up = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if up.returncode and "apt-get could not install" in up.stderr:
        pytest.skip(up.stderr.splitlines()[-1])
    try:
        assert up.returncode == 0, up.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(state / "slurm.conf"))
            yield state
    finally:
        subprocess.run([TESTBED / "down", "--state", state], check=True, timeout=60)
