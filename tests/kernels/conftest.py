"""Tests marked `interpreted` run their Triton kernels through Triton's interpreter, on a CPU.

Triton decides when it is imported whether `@triton.jit` interprets or compiles, for the whole process. So this process
never sets TRITON_INTERPRET: here kernels compile (test_compile, tests with -m gpu) and the rest of the suite has the
Triton that its users have. The selected `interpreted` tests run in one child, a pytest that has TRITON_INTERPRET=1 from
the start, and their outcomes and failure texts are reported here as their own. A test file imports kernels at its top
as usual; fixtures of an interpreted test are set up in both processes. `TRITON_INTERPRET=1 pytest FILE` runs without
the child, for a debugger.
"""

import json
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHANNEL = "MGCC_TEST_REPORTS"  # number of the file descriptor to which the child writes its reports

child = pytest.StashKey["Child"]()


class Child:
    """A pytest under the interpreter, and the reports that came from it so far."""

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
        """("passed", "failed" or "skipped", and why), once the child has it."""
        while node not in self.reports:
            line = self.lines.readline()
            if not line:
                return "failed", f"the pytest with TRITON_INTERPRET=1 ended early, exit code {self.process.wait()}"
            name, outcome, why = json.loads(line)
            self.reports[name] = outcome, why
        return self.reports[node]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.lines.close()


def pytest_runtest_logreport(report):
    """In the child: tell the parent of each test that was called, or that failed or was skipped before it was."""
    if CHANNEL in os.environ and (report.when == "call" or (report.when == "setup" and not report.passed)):
        why = report.longrepr[2] if report.skipped else report.longreprtext
        os.write(int(os.environ[CHANNEL]), (json.dumps([report.nodeid, report.outcome, why]) + "\n").encode())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if INTERPRETED or not pyfuncitem.get_closest_marker("interpreted"):
        return None  # pytest calls it
    stash = pyfuncitem.config.stash
    if child not in stash:
        marked = [item.nodeid for item in pyfuncitem.session.items if item.get_closest_marker("interpreted")]
        stash[child] = Child(pyfuncitem.config, marked)
    outcome, why = stash[child].outcome(pyfuncitem.nodeid)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
    if outcome == "skipped":
        pytest.skip(why)
    return True


def pytest_sessionfinish(session):
    if child in session.config.stash:
        session.config.stash[child].stop()
