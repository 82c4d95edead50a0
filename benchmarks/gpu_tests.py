"""Run the tests that need a GPU, kernels first, and write each outcome as it comes.

    python -m benchmarks.gpu_tests --out gpu_tests.json

Exits with pytest's status. `--marker` and `--paths` select other tests.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mgcc_dist.common.environment import ROOT, benchmark_header
from mgcc_dist.common.files import write_json


class Recorder:
    """A pytest plugin that rewrites `out` after every test, so that a run that is killed keeps its outcomes."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.header = benchmark_header("benchmarks.gpu_tests")
        self.tests: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if not report.passed:
            text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
            test |= {"outcome": report.outcome, "reason": text[-2000:]}
        if report.when == "teardown":
            self.write()

    def write(self) -> None:
        outcomes = [test["outcome"] for test in self.tests.values()]
        counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
        row = counts | {"seconds": round(time.monotonic() - self.started, 1)}
        write_json(self.out, {**self.header, "rows": {"tests": row}, "tests": self.tests})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--marker", default="gpu", help="pytest marker of the tests to run (default: gpu)")
    parser.add_argument("--paths", type=Path, nargs="+", help="test files (default: all that name the marker)")
    options = parser.parse_args()
    paths = options.paths or marked_files(ROOT / "tests", options.marker)
    arguments = ["-q", "-p", "no:cacheprovider", "--tb", "short", "-m", options.marker, *map(str, paths)]
    sys.exit(pytest.main(arguments, plugins=[Recorder(options.out)]))


def marked_files(folder: Path, marker: str) -> list[Path]:
    """Return the test files in `folder` that use `marker`, those of the kernels first."""
    pattern = re.compile(rf"\bmark\.{marker}\b")
    files = [path for path in sorted(folder.rglob("test_*.py")) if pattern.search(path.read_text(encoding="utf-8"))]
    return sorted(files, key=lambda path: path.relative_to(folder).parts[0] != "kernels")


if __name__ == "__main__":
    main()
