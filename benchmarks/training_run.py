"""Train MGCC with `mgcc_dist.segment` for a given time: as many steps as fit, to the end of the schedule.

    python -m benchmarks.training_run --paper --shards out/busi --seconds 240 --folder out/run --out training_run.json

The number of steps follows from the speed in --step-times, a result file of benchmarks.train_step at the same size;
without one the speed is measured first. The fastest setting of `segment` in it is used. At the deadline the run gets
SIGTERM and saves a checkpoint, and the same command with the same --folder resumes it; give --total-seconds if several
calls are planned. Without --shards it trains on phantom data, which is good for the speed only.
"""

import argparse
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Child, raise_on_sigterm
from benchmarks.step import StepConfig
from benchmarks.train_step import MIXED, Row, add_size_options, enabled, measure_in_process, step_config
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import EXIT_STOPPED, UserError, run_program
from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.splits import Split, locate_split, make_split, read_split, write_split

KEPT = ("result.json", "metrics.jsonl", "config.yaml", "environment.json", "best/gallery.png", "last/gallery.png")
PHANTOMS = 80
MOST_EPOCHS = 300
VALIDATIONS = 20


@dataclass(frozen=True)
class Mode:
    """Options of `segment`, and the rows of benchmarks.train_step that have their speed, the best match first."""

    options: tuple[str, ...]
    rows: tuple[str, ...]
    compile_seconds: float = 0.0


BF16 = ("--loop.precision", "bf16")
COMPILE = ("--loop.compile", "default")
MODES = (
    Mode(BF16, (f"{MIXED} auto_kernels", MIXED)),
    Mode((*BF16, "--kernels", "triton"), (f"{MIXED} fused_kernels",)),
    Mode((*BF16, *COMPILE), (f"{MIXED} compile auto_kernels", f"{MIXED} compile"), 120),
    Mode((*BF16, *COMPILE, "--kernels", "triton"), (f"{MIXED} compile fused_kernels",), 120),
    Mode(("--loop.precision", "no"), ("channels_last", "eager")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--folder", type=Path, required=True, help="run folder, and phantom data if it is needed")
    parser.add_argument("--seconds", type=float, required=True, help="time for this call")
    parser.add_argument("--total-seconds", type=float, help="time for this and later calls (default: --seconds)")
    parser.add_argument("--steps", type=int, help="length of the run, instead of what fits into the time")
    parser.add_argument("--shards", type=Path, help="shard folder of a labeled data set (default: phantom data)")
    parser.add_argument("--split", default="busi_random_1", help="split of --shards (default: busi_random_1)")
    parser.add_argument("--step-times", type=Path, help="result file of benchmarks.train_step")
    add_size_options(parser)
    options = parser.parse_args()
    raise_on_sigterm()
    deadline = time.monotonic() + options.seconds
    header = benchmark_header("benchmarks.training_run")
    config = step_config(options, steps=6)

    chosen = options.folder / "options.json"
    if not chosen.is_file():
        shards, split = data(options, config)
        spent = options.seconds - (deadline - time.monotonic())
        total = (options.total_seconds or options.seconds) - spent
        measured = speeds(options.step_times, config, total / 3)
        write_json(chosen, run_options(config, shards, split, measured, total, options.steps))
    command = [sys.executable, "-m", "mgcc_dist.segment", *read_json(chosen), "--out", str(options.folder / "run")]
    save = save_seconds(config)
    seconds = max(0.0, deadline - time.monotonic() - save)
    print("training_run:", " ".join(command), flush=True)
    status = Child(command, seconds, save).wait()
    if status not in (0, EXIT_STOPPED):
        raise UserError(f"segment ended with exit status {status}; its error is above")
    row = outcome(options.folder / "run")
    write_json(options.out, {**header, "options": read_json(chosen), "rows": {"MGCC": row}})
    keep(options.folder / "run", options.out.with_suffix(""))
    print(f"training_run: {row} -> {options.out}")


def data(options: argparse.Namespace, config: StepConfig) -> tuple[Path, Path]:
    """Return shard folder and split file; phantoms are written into --folder."""
    if options.shards:
        return options.shards, locate_split(options.split)
    shards, split = options.folder / "phantoms", options.folder / "split.json"
    folder = write_shards(Phantoms(PHANTOMS, seed=0, size=config.size), shards)
    parts = make_split(folder.records, 0, PHANTOMS // 5, 2 * PHANTOMS // 5, grouped=False, name="phantoms")
    write_split(split, parts)
    return shards, split


def speeds(file: Path | None, config: StepConfig, seconds: float) -> dict[str, float]:
    """Return steps per second by row of benchmarks.train_step, from `file` if it has this size; else measure one."""
    if file and file.is_file():
        content = read_json(file)
        if (content["case"]["size"], tuple(content["case"]["widths"])) == (config.size, config.widths):
            rows = content["rows"].items()
            return {name: row["steps_per_second"] for name, row in rows if "steps_per_second" in row}
        print(f"training_run: {file} is of another size, so the speed is measured again")
    name = MIXED if config.device == "cuda" else "channels_last"
    row = measure_in_process(Row(name, enabled(name.split())), config, seconds)
    if "not_run" in row:
        raise UserError(f"the speed of a training step could not be measured: {row['not_run']}")
    return {name: row["steps_per_second"]}


def run_options(
    config: StepConfig,
    shards: Path,
    split: Path,
    measured: dict[str, float],
    seconds: float,
    steps: int | None = None,
) -> list[str]:
    """Return the options of `segment` for the mode with which most steps fit into `seconds`; `steps` if given."""
    parts = read_split(split)
    fitting = {
        mode: steps_that_fit(measured[row], parts, config, seconds - mode.compile_seconds)
        for mode in MODES
        if (row := next((name for name in mode.rows if name in measured), None))
    }
    if not fitting:
        raise UserError(f"--step-times: no row has the speed of a setting of segment; it has {', '.join(measured)}")
    mode = max(fitting, key=lambda each: fitting[each])
    per_epoch = len(parts.labeled) / config.batch
    steps = steps or min(fitting[mode], math.ceil(MOST_EPOCHS * per_epoch))
    keys: dict[str, Any] = {
        "data.shards": shards,
        "data.split": split,
        "data.image_size": config.size,
        "data.batch_labeled": config.batch,
        "data.batch_unlabeled": config.batch,
        "network.widths": list(config.widths),
        "loop.epochs": "null",
        "loop.steps": steps,
        "loop.validate_every": max(1, math.ceil(steps / per_epoch / VALIDATIONS)),
        "loop.checkpoint_every": 1_000_000,  # only at the end or when stopped
        "loop.log_every": max(1, min(50, steps // 10)),
    }
    return ["--preset", "mgcc_busi", *(f"--{key}={value}" for key, value in keys.items()), *mode.options]


def steps_that_fit(steps_per_second: float, split: Split, config: StepConfig, seconds: float) -> int:
    """Return the number of training steps for `seconds`, 1 or more, with validations in between."""
    validation = len(split.validation) / config.batch / steps_per_second / 8  # inference of one of four decoders
    # The start imports and checks the shards, the end scores two networks, draws galleries and saves.
    available = seconds - 3 * save_seconds(config) - VALIDATIONS * validation
    return max(1, int(0.95 * available * steps_per_second))


def save_seconds(config: StepConfig) -> float:
    """Return the time reserved for one checkpoint, which has 1 GB at the paper's widths."""
    return 25 if config.widths[-1] >= 512 else 5


def outcome(run: Path) -> dict[str, Any]:
    """Return steps, speed and scores of the run so far."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    print("training_run: last metrics:", lines[-1] if lines else "none", flush=True)
    if not (run / "result.json").is_file():
        return {"finished": False}
    result = read_json(run / "result.json")
    return {
        "finished": True,
        "steps": result["steps"],
        "training_seconds": result["seconds"]["training"],
        "steps_per_second": round(result["steps"] / result["seconds"]["training"], 3),
        "iou": result["best"]["summary"]["corrected"]["iou"],
    }


def keep(run: Path, folder: Path) -> None:
    """Copy the small files of the run to `folder`."""
    for name in KEPT:
        if (run / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, folder / name)


if __name__ == "__main__":
    run_program("training_run", main)
