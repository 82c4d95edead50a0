"""Speed of a complete MGCC training step, from batches in host memory to updated weights, by setting.

    python -m benchmarks.train_step --out benchmarks/results/train_step-cpu.json
    python -m benchmarks.train_step --paper --combinations --steps 21 --out FILE       (on a GPU)

By default an ablation:

plain     the loop of the paper's released code: eager, NCHW, three-channel images copied from pageable memory, one
          forward pass for all eight images, F-Noise drawn on the host and copied, torch's default SGD, deterministic
          cuDNN, and on every step three losses and a training IoU read on the host. The layers are the package's, which
          are the paper's. As in the released code, cuDNN may use TF32, torch's default.
eager     the package's step (method, seeds and losses as train/loop.py calls them) in float32 without TF32: no reads,
          perturbations on the device, images of one channel. Nothing else.
...       eager plus one setting (benchmarks/step.py lists them); --ablate names the ones to measure.
fastest   eager plus every setting that on its own was faster than eager on this machine; not measured again if that is
          one setting or none.

--combinations instead measures settings that are used together, the most informative first: see COMBINATIONS.

Each row runs in its own process, from the same weights on the same images, so that peak memory and global flags are its
own. A row that this machine cannot run is listed with the reason. Times cover `--steps` steps in three blocks: the
median block, with lowest and highest. Losses differ a little between rows, because their perturbations differ. The
file is rewritten after every row.
"""

import argparse
import math
import resource
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import fork_context
from benchmarks.step import PAPER_WIDTHS, SETTINGS, StepConfig, StepSettings, Unsupported, package_step, released_step
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import reason_of
from mgcc_dist.common.files import write_json

WARM_UP_STEPS, BLOCKS = 3, 3


@dataclass(frozen=True)
class Row:
    name: str
    settings: StepSettings | None
    """None: the loop of the released code"""
    seconds: float = 0.0
    """that it is expected to take on a GPU at the paper's size; with --seconds it is not started with less left"""


PLAIN, EAGER = Row("plain", None, 25), Row("eager", StepSettings(), 25)
MIXED = "channels_last bf16 fused_sgd"


def combination(names: str, seconds: float) -> Row:
    return Row(names, enabled(names.split()), seconds)


def enabled(names: Iterable[str]) -> StepSettings:
    return StepSettings(**dict.fromkeys(names, True))


COMBINATIONS = (
    combination(MIXED, 20),
    combination(f"{MIXED} fused_kernels", 25),
    combination(f"{MIXED} auto_kernels", 20),
    combination(f"{MIXED} fused_kernels cuda_graphs", 25),
    PLAIN,
    combination(f"{MIXED} added_biases", 20),
    combination(f"{MIXED} compile", 100),
    combination(f"{MIXED} phase_upconv", 20),
    combination(f"{MIXED} cuda_graphs", 25),
    combination(f"{MIXED} compile fused_kernels", 100),
    combination(f"{MIXED} auto_kernels cuda_graphs cudnn_benchmark", 45),
    EAGER,
    combination(f"{MIXED} compile phase_upconv", 100),
    combination(f"{MIXED} compile auto_kernels", 100),
    combination(f"{MIXED} compile cuda_graphs fused_kernels", 100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_size_options(parser)
    parser.add_argument("--steps", type=int, default=9, help="timed steps per row (default: 9)")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--ablate", nargs="+", choices=SETTINGS, default=SETTINGS, help="settings of the ablation (all)")
    rows.add_argument("--combinations", action="store_true", help="measure settings that are used together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing that would end later than this")
    options = parser.parse_args()
    config = step_config(options, max(BLOCKS, options.steps))
    header = {**benchmark_header("benchmarks.train_step"), "case": asdict(config)}
    deadline = time.monotonic() + options.seconds
    results: dict[str, dict[str, Any]] = {}

    def measure_row(row: Row, limit: float) -> None:
        results[row.name] = measure_in_process(row, config, limit)
        add_ratios(results)
        print(f"{row.name}: {results[row.name]}", flush=True)
        write_json(options.out, {**header, "rows": results})

    longest = 0.0
    for row in COMBINATIONS if options.combinations else ablation(options.ablate):
        started = time.monotonic()
        needed = row.seconds if options.combinations else 2 * longest  # of an ablation, "fastest" comes after it
        if started + needed > deadline:
            left = max(0.0, deadline - started)
            results[row.name] = {"not_run": f"needs about {needed:.0f} s, {left:.0f} s were left"}
            continue
        measure_row(row, deadline - started)
        longest = max(longest, time.monotonic() - started)
    if not options.combinations:
        names = faster_than_eager(results)
        if len(names) > 1:
            measure_row(Row("fastest", enabled(names)), math.inf)
        else:  # measured already
            results["fastest"] = results[names[0] if names else "eager"]
        results["fastest"] = {"settings": names} | results["fastest"]
    write_json(options.out, {**header, "rows": results})
    print(f"train_step: {options.out}")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action="store_true", help="the paper's --size and --widths")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default: 128, paper: 256)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="(default: 16 to 256, paper: 64 to 1024)"
    )
    parser.add_argument("--batch", type=int, default=4, help="labeled images, and as many unlabeled (paper: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads per process")


def step_config(options: argparse.Namespace, steps: int) -> StepConfig:
    size, widths = (256, PAPER_WIDTHS) if options.paper else (options.size, tuple(options.widths))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return StepConfig(size, widths, options.batch, steps, device, options.threads)


def ablation(names: list[str]) -> list[Row]:
    return [PLAIN, EAGER, *(Row(name, enabled([name])) for name in names)]


def faster_than_eager(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the settings that "fastest" combines."""
    speeds = {name: _speed(results.get(name, {})) for name in SETTINGS if name not in ("two_forwards", "added_biases")}
    slower_kernels = min("fused_kernels", "auto_kernels", key=lambda name: speeds[name])
    eager = _speed(results["eager"])
    return [name for name, speed in speeds.items() if speed > eager > 0 and name != slower_kernels]


def add_ratios(results: dict[str, dict[str, Any]]) -> None:
    for base in ("plain", "eager"):
        slowest = _speed(results.get(base, {}))
        for row in results.values():
            if _speed(row) and slowest:
                row[f"ratio_to_{base}"] = round(_speed(row) / slowest, 3)


def _speed(row: dict[str, Any]) -> float:
    return row.get("steps_per_processor_second") or row.get("steps_per_second", 0.0)


def measure_in_process(row: Row, config: StepConfig, limit: float) -> dict[str, Any]:
    """Run `measure` in a new process, for at most `limit` seconds; a failure becomes the row's `not_run`."""
    context = fork_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(sender, row.settings, config))
    process.start()
    sender.close()
    try:
        if not receiver.poll(None if math.isinf(limit) else max(0.0, limit)):
            return {"not_run": f"stopped after {limit:.0f} s, when the time was over"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"not_run": f"its process ended with exit code {process.exitcode}; out of memory?"}
    finally:
        process.kill()
        process.join()


def _measure_and_send(sender: Connection, settings: StepSettings | None, config: StepConfig) -> None:
    try:
        row = measure(settings, config)
    except Unsupported as error:
        row = {"not_run": str(error)}
    except Exception as error:  # whatever a compiler or a driver raises, the other rows still count
        row = {"not_run": f"{type(error).__name__}: {reason_of(error)}"}
    sender.send(row)


def measure(settings: StepSettings | None, config: StepConfig) -> dict[str, Any]:
    """Time one row in this process; None is the loop of the released code."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    step, facts = (released_step(config), {}) if settings is None else package_step(settings, config)
    for number in range(WARM_UP_STEPS):
        loss = step(number)
        if number == 0:
            synchronize(config)
            first = time.perf_counter() - started
    synchronize(config)
    wall, processor = [], []
    number = WARM_UP_STEPS
    steps = config.steps // BLOCKS
    for _ in range(BLOCKS):
        started, processor_started = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = step(number)
            number += 1
        synchronize(config)
        wall.append(steps / (time.perf_counter() - started))
        processor.append(steps / (time.process_time() - processor_started))
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        facts["steps_per_processor_second"] = round(statistics.median(processor), 3)
    return facts | {
        "steps_per_second": round(statistics.median(wall), 3),
        "steps_per_second_lowest_highest": [round(min(wall), 3), round(max(wall), 3)],
        "peak_memory_mib": round(peak),
        "seconds_to_first_step": round(first, 1),
        "loss": round(loss.item(), 4),
        "loss_after_steps": number,
    }


def synchronize(config: StepConfig) -> None:
    if config.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
