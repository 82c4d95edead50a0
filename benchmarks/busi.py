"""Rows of Table I on BUSI, as many as fit into a time: for a machine with a GPU.

    python -m benchmarks.busi --root DIR --minutes 9 --rows U-Net MGCC --seeds 1 -- --loop.precision bf16
    python -m benchmarks.busi --root DIR --minutes 55 -- --loop.precision bf16

Writes shards of --size once, then trains the runs of the sweep file in the order U-Net, MGCC, the other rows on the
first split, then the next splits. When the time is up, or this program is told to end, the running one is told to stop
and saves itself: the same command goes on from there. Words after `--` go to every run (`mgcc_dist.segment`). Of each
finished run result.json, not its weights, is copied to benchmarks/results/busi/, named by row and seed.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mgcc_dist.common.errors import EXIT_STOPPED, UserError, run_program
from mgcc_dist.common.sweep_file import SweepRun, read_sweep, slug
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.busi import busi

FIRST = ("U-Net", "MGCC")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="BUSI as published")
    parser.add_argument("--minutes", type=float, required=True, help="time for all of it")
    parser.add_argument("--sweep", type=Path, default=Path("configs/sweeps/table_1.yaml"))
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds; seed k is on split k")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the shards")
    parser.add_argument("--out", type=Path, default=Path("out/busi_table_1"), help="shards and run folders")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/busi"))
    parser.add_argument("words", nargs="*", help="after --: keys of mgcc_dist.segment for every run")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    runs = chosen(read_sweep(options.sweep).runs, options.rows, options.seeds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `before` hands it on

    shards = options.out / f"shards_{options.size}"
    if not (shards / "index.json").is_file():
        write_shards(busi(options.root), shards, size=options.size)
    for run in runs:
        folder = options.out / slug(run.row) / f"seed_{run.seed}"
        words = ["--data.shards", str(shards), "--out", str(folder), *options.words]
        status = before(deadline, [sys.executable, *run.command(), *words])
        if status in (EXIT_STOPPED, None):
            print(f"busi: the time is up at {run.row}, seed {run.seed}; the same command goes on from there")
            return
        if status:
            raise UserError(f"{run.row}, seed {run.seed} ended with exit status {status}; what it said stands above")
        options.results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "result.json", options.results / f"{slug(run.row)}-seed_{run.seed}.json")
    print("busi: all runs are finished")


def chosen(runs: list[SweepRun], rows: list[str] | None = None, seeds: list[int] | None = None) -> list[SweepRun]:
    """The runs on BUSI by seed, and in each seed U-Net and MGCC before the other rows; those that are asked for.

    Raises:
        UserError: there is none of them.
    """
    mine = [run for run in runs if run.dataset == "BUSI"]
    for name, asked, known in (("row", rows, {run.row for run in mine}), ("seed", seeds, {run.seed for run in mine})):
        if unknown := [each for each in asked or [] if each not in known]:
            raise UserError(f"the sweep has no {name} {unknown[0]} on BUSI; there are {', '.join(map(str, known))}")
    mine = [run for run in mine if (not rows or run.row in rows) and (not seeds or run.seed in seeds)]
    return sorted(mine, key=lambda run: (run.seed, FIRST.index(run.row) if run.row in FIRST else len(FIRST)))


def before(deadline: float, command: list[str]) -> int | None:
    """Exit status of `command`, which gets SIGTERM at the deadline; None if there is no time left to start it.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, handed on to the command, which has ended by then.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    with subprocess.Popen(command) as process:
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
            return EXIT_STOPPED if code < 0 else code  # it had not begun to train
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


if __name__ == "__main__":
    run_program("busi", main)
