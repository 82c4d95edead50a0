"""Train the rows of Table I on BUSI, as many as fit into a given time, on a machine with a GPU.

    python -m benchmarks.busi --root DIR --minutes 9 --rows U-Net MGCC --seeds 1 -- --loop.precision bf16
    python -m benchmarks.busi --root DIR --minutes 55 -- --loop.precision bf16

Writes shards of --size once, then trains the runs of the sweep file: U-Net, MGCC, the other rows of the first split,
then the next splits. When the time is up, or on SIGTERM, the current run gets SIGTERM and saves a checkpoint; rerun
the same command to resume. Options after `--` go to every run (`mgcc_dist.segment`). The result.json of each finished
run, without weights, is copied to benchmarks/results/busi/ and named by row and seed.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from benchmarks.processes import Child, raise_on_sigterm
from mgcc_dist.common.errors import EXIT_STOPPED, UserError, run_program
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.sweep.runs import SweepRun
from mgcc_dist.sweep.schema import slug

FIRST = ("U-Net", "MGCC")
SAVE_SECONDS = 600  # for a run to save itself once its time is up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="BUSI as published")
    parser.add_argument("--minutes", type=float, required=True, help="total time")
    parser.add_argument("--sweep", type=Path, default=Path("configs/sweeps/table_1.yaml"))
    parser.add_argument("--rows", nargs="+", help="rows to train (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to train; seed k uses split k (default: all)")
    parser.add_argument("--size", type=int, default=256, help="image side of the shards in pixels")
    parser.add_argument("--out", type=Path, default=Path("out/busi_table_1"), help="shards and run folders")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/busi"))
    parser.add_argument("arguments", nargs="*", help="after --: options of mgcc_dist.segment for every run")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    runs = select_runs(read_sweep(options.sweep).runs, options.rows, options.seeds)
    raise_on_sigterm()

    shards = options.out / f"shards_{options.size}"
    if not (shards / "index.json").is_file():
        write_shards(busi(options.root), shards, size=options.size)
    for run in runs:
        folder = options.out / slug(run.row) / f"seed_{run.seed}"
        arguments = ["--data.shards", str(shards), "--out", str(folder), *options.arguments]
        status = train([sys.executable, *run.command(), *arguments], deadline)
        if status == EXIT_STOPPED:
            print(f"busi: the time is up in {run.row}, seed {run.seed}; rerun the same command to resume")
            return
        if status:
            raise UserError(f"{run.row}, seed {run.seed}: exit status {status}. See its error above.")
        options.results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "result.json", options.results / f"{slug(run.row)}-seed_{run.seed}.json")
    print("busi: all runs are finished")


def select_runs(runs: list[SweepRun], rows: list[str] | None = None, seeds: list[int] | None = None) -> list[SweepRun]:
    """Return the requested runs on BUSI by seed, with U-Net and MGCC before the other rows.

    Raises:
        UserError: the sweep has no such row or seed.
    """
    on_busi = [run for run in runs if run.dataset == "BUSI"]
    known_rows, known_seeds = ({run.row: None for run in on_busi}, {run.seed: None for run in on_busi})
    for name, requested, known in (("row", rows, known_rows), ("seed", seeds, known_seeds)):
        if unknown := [each for each in requested or [] if each not in known]:
            choices = ", ".join(map(str, known))
            raise UserError(f"--{name}s: the sweep has no {name} {unknown[0]} on BUSI. Choose from {choices}.")
    selected = [run for run in on_busi if (not rows or run.row in rows) and (not seeds or run.seed in seeds)]
    return sorted(selected, key=lambda run: (run.seed, FIRST.index(run.row) if run.row in FIRST else len(FIRST)))


def train(command: list[str], deadline: float) -> int:
    """Run `command` and return its exit status: EXIT_STOPPED if the time was up before it finished or even started."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return EXIT_STOPPED
    child = Child(command, seconds, SAVE_SECONDS)
    status = child.wait()
    return EXIT_STOPPED if child.timed_out and status else status


if __name__ == "__main__":
    run_program("busi", main)
