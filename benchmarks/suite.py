"""Run benchmarks within a time budget, the most valuable first, for example on a GPU machine you have for ten minutes.

    python -m benchmarks.suite --seconds 600 --out out/suite                   (also on a CPU, at smaller sizes)
    python -m benchmarks.suite --seconds 120 --out out/suite --quick           (toy sizes: shows that everything runs)
    python -m benchmarks.suite --seconds 300 --out out/suite --stages training_run --shards out/busi

Each stage is a process of its own with its share of the time. A stage that fails or exceeds its share is reported and
the next one starts. OUT holds, at any moment, everything measured so far: STAGE.json and STAGE.log of each stage,
measured.json (the kernel table), and summary.json and summary.md: whether each stage ran, failed or was skipped, how
long it took, and its command. Stages of earlier calls with the same OUT stay in the summary.

On a GPU, without --quick, the kernel stages also write their rows to kernels/measured.json, which `auto` reads. Exits
with status 1 if a stage failed.
"""

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import markdown_table
from benchmarks.processes import Child, raise_on_sigterm
from benchmarks.stages import STAGES, Context, Stage, modules, python
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.files import read_json, write_json, write_text

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "TQDM_DISABLE": "1",  # progress bars fill the logs
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
LINES_SHOWN = 6
SUMMARY_SECONDS = 2
START_SECONDS = 8  # imports, before a stage's own clock starts


def main() -> None:
    options = _options()
    started = time.monotonic()
    selected = [stage for stage in STAGES.values() if stage.name in options.stages]
    if options.list:
        for stage in STAGES.values():
            print(f"{stage.name:16} {stage.description}{' (on request)' * stage.on_request}")
        return
    raise_on_sigterm()
    context = Context(
        out=options.out.resolve(),
        work=(options.work or options.out / "work").resolve(),
        cuda=torch.cuda.is_available(),
        quick=options.quick,
        shards=options.shards,
        split=options.split,
        images=options.images,
        total_seconds=options.total_seconds,
    )
    context = replace(context, modules=modules(selected, context))
    context.work.mkdir(parents=True, exist_ok=True)
    os.environ |= ENVIRONMENT
    suite = Suite(context, started + options.seconds)
    try:
        suite.run(selected)
    except KeyboardInterrupt:
        suite.skip_unfinished(selected, "the suite was interrupted")
        sys.exit(130)
    finally:
        print(f"suite: {context.out / 'summary.md'}\n{suite.table()}", flush=True)
    sys.exit(1 if any(suite.stages[stage.name]["status"] == "failed" for stage in selected) else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required="--list" not in sys.argv, help="time for all stages")
    parser.add_argument("--out", type=Path, default=Path("out/suite"), help="folder for results (default: out/suite)")
    default = [stage.name for stage in STAGES.values() if not stage.on_request]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=default, metavar="STAGE", help="see --list")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument("--quick", action="store_true", help="toy sizes: about a minute on a CPU; numbers mean nothing")
    parser.add_argument("--shards", type=Path, help="shard folder to train on (default: phantom data)")
    parser.add_argument("--split", default="busi_random_1", help="split of --shards (default: busi_random_1)")
    parser.add_argument("--images", type=Path, help="BUSI as published, for the stages loader and predict")
    parser.add_argument("--work", type=Path, help="folder of the training run, to resume it (default: OUT/work)")
    parser.add_argument(
        "--total-seconds", type=float, help="training time of this and later calls, with the same --work"
    )
    return parser.parse_args()


class Suite:
    """Runs stages and keeps their summary in the result folder."""

    def __init__(self, context: Context, deadline: float) -> None:
        self.context = context
        self.deadline = deadline
        self.header = benchmark_header("benchmarks.suite")
        earlier = context.out / "summary.json"
        self.stages: dict[str, dict[str, Any]] = read_json(earlier)["stages"] if earlier.is_file() else {}
        self.running: tuple[Stage, Child] | None = None
        """a background stage"""

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic() - SUMMARY_SECONDS

    def run(self, selected: list[Stage]) -> None:
        for number, stage in enumerate(selected):
            alongside, self.running = self.running, None
            try:
                self.start(stage, self.seconds_for(stage, selected[number:]))
            except KeyboardInterrupt:
                if alongside:
                    alongside[1].terminate()
                    self.report(alongside[0], status="failed", reason="interrupted")
                raise
            if alongside:
                self.finish(*alongside)
        if self.running:
            self.finish(*self.running)

    def seconds_for(self, stage: Stage, to_come: list[Stage]) -> float:
        """Return the time of `stage`, which is the first of `to_come`; what it leaves falls to the others."""
        shares = sum(each.share for each in to_come if each.needs(self.context) is None)
        share = self.left * stage.share / shares if shares else self.left
        return min(self.left, stage.most, max(share, self.least(stage)))

    def least(self, stage: Stage) -> float:
        return min(stage.least, 20.0) if self.context.quick else stage.least

    def start(self, stage: Stage, seconds: float) -> None:
        """Run `stage` to its end, or start it if it is a background stage."""
        command = python(stage.command(self.context, seconds - stage.grace - START_SECONDS))
        shown = " ".join(["python", *command[1:]])
        if reason := self.reason_to_skip(stage):
            self.report(stage, status="skipped", reason=reason, command=shown)
            return
        log = self.context.out / f"{stage.name}.log"
        for old in (log, self.context.result(stage.name)):
            old.unlink(missing_ok=True)
        print(f"suite: {stage.name} (at most {seconds:.0f} s of {self.left:.0f} s left): {shown}", flush=True)
        self.report(stage, status="running", command=shown)
        child = Child(command, seconds - stage.grace, stage.grace, log)
        if stage.background:
            self.running = stage, child
        else:
            self.finish(stage, child)

    def reason_to_skip(self, stage: Stage) -> str | None:
        if reason := stage.needs(self.context):
            return reason
        least = self.least(stage)
        return f"{max(0.0, self.left):.0f} s left, needs {least:.0f} s" if self.left < least else None

    def finish(self, stage: Stage, child: Child) -> None:
        """Wait for the stage and report it."""
        try:
            status = child.wait()
        except KeyboardInterrupt:
            self.report(stage, status="failed", reason="interrupted", seconds=_since(child.started))
            raise
        log = self.context.out / f"{stage.name}.log"
        lines = log.read_text(errors="replace").splitlines()
        print(*lines[-LINES_SHOWN:], sep="\n", flush=True)
        reason = None
        if child.timed_out:
            reason = f"stopped after {child.deadline - child.started:.0f} s, its share of the time"
        elif status:
            reason = f"exit status {status}: {lines[-1] if lines else 'no output'}"
        if stage.writes_table and self.context.table.is_file():
            copy = self.context.out / "measured.json"
            if copy != self.context.table:
                shutil.copyfile(self.context.table, copy)
        self.report(stage, status="failed" if reason else "ran", reason=reason, seconds=_since(child.started))

    def report(self, stage: Stage, **entry: Any) -> None:
        """Update the stage's entry and write both summaries."""
        if "command" in entry:
            self.stages.pop(stage.name, None)
        row = self.stages.get(stage.name, {}) | entry
        result = self.context.result(stage.name)
        row["result"] = result.name if row["status"] not in ("running", "skipped") and result.is_file() else None
        self.stages[stage.name] = {key: value for key, value in row.items() if value is not None}
        write_json(self.context.out / "summary.json", {**self.header, "stages": self.stages})
        write_text(self.context.out / "summary.md", self.markdown())
        if row["status"] != "running":
            print(f"suite: {stage.name}: {row['status']}" + f" ({row['reason']})" * bool(row.get("reason")), flush=True)

    def skip_unfinished(self, selected: list[Stage], reason: str) -> None:
        for stage in selected:
            if self.stages.get(stage.name, {}).get("status", "running") == "running":
                self.report(stage, status="skipped", reason=reason)

    def table(self) -> str:
        columns = ("status", "seconds", "result", "reason")
        rows = [[name, *(str(row.get(column, "")) for column in columns)] for name, row in self.stages.items()]
        return markdown_table(["stage", *columns], rows)

    def markdown(self) -> str:
        header, cuda = self.header, self.header["versions"].get("cuda")
        lines = [
            f"# Benchmarks, {header['date']}",
            "",
            f"{header['device']}, {header['processor']}, {header['cores']} cores, torch {header['versions']['torch']}"
            + f", CUDA {cuda}" * bool(cuda)
            + f", commit {header['commit']}"
            + ", **toy sizes: the numbers mean nothing**" * self.context.quick,
            "",
            self.table(),
            "",
            *(f"- {name}: `{row['command']}`" for name, row in self.stages.items() if "command" in row),
        ]
        return "\n".join(lines) + "\n"


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


if __name__ == "__main__":
    run_program("suite", main)
