"""Tests marked `interpreted` run their Triton kernels in Triton's interpreter, on a CPU.

Triton decides at import, for the whole process, whether `@triton.jit` interprets or compiles. This process never sets
TRITON_INTERPRET, so its kernels compile (test_compile, tests with -m gpu) and all other tests see Triton as users do.
The selected `interpreted` tests run in one child pytest process with TRITON_INTERPRET=1. Their outcomes and failure
texts are reported here as if they had run here. Test files import kernels at the top as usual; fixtures of an
interpreted test are set up in both processes. To debug, run `TRITON_INTERPRET=1 pytest FILE`, without a child.
"""

import json
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHANNEL = "MGCC_TEST_REPORTS"  # file descriptor on which the child sends its reports

child = pytest.StashKey["Child"]()


class Child:
    """A pytest process with TRITON_INTERPRET=1, and the reports received from it so far."""

    def __init__(self, config, nodes):
        self.reports = {}
        reader, writer = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes],
            cwd=config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", CHANNEL: str(writer)},
            pass_fds=[writer],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(writer)
        self.lines = os.fdopen(reader, encoding="utf-8")

    def outcome(self, node):
        """Wait for a test; return ("passed", "failed" or "skipped", reason)."""
        while node not in self.reports:
            line = self.lines.readline()
            if not line:
                return (
                    "failed",
                    f"the pytest process with TRITON_INTERPRET=1 exited early with code {self.process.wait()}",
                )
            name, outcome, reason = json.loads(line)
            self.reports[name] = outcome, reason
        return self.reports[node]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.lines.close()


def pytest_runtest_logreport(report):
    """In the child: send the parent the outcome of each test, or of a setup that failed or was skipped."""
    if CHANNEL in os.environ and (report.when == "call" or (report.when == "setup" and not report.passed)):
        reason = report.longrepr[2] if report.skipped else report.longreprtext
        os.write(int(os.environ[CHANNEL]), (json.dumps([report.nodeid, report.outcome, reason]) + "\n").encode())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if INTERPRETED or not pyfuncitem.get_closest_marker("interpreted"):
        return None  # pytest runs it
    stash = pyfuncitem.config.stash
    if child not in stash:
        marked = [item.nodeid for item in pyfuncitem.session.items if item.get_closest_marker("interpreted")]
        stash[child] = Child(pyfuncitem.config, marked)
    outcome, reason = stash[child].outcome(pyfuncitem.nodeid)
    if outcome == "failed":
        pytest.fail(reason, pytrace=False)
    if outcome == "skipped":
        pytest.skip(reason)
    return True


def pytest_sessionfinish(session):
    if child in session.config.stash:
        session.config.stash[child].stop()
