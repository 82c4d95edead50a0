"""What 10,000 runs, 1,000 ranks and 10 million images cost on one machine, without a cluster.

    python -m benchmarks.scale --out benchmarks/results/scale-cpu.json
    python -m benchmarks.scale --out scale.json --stages sweep --runs 1000      # a part, added to the file

`sweep` plans, submits (to a stand-in for Slurm that accepts everything), shows and reports a sweep of made-up run
folders, whose files are those of a real run with other scores. `loader` opens an index, draws permutations and one
rank's batches. `ranks` finds the slow ones. `checkpoint` saves and loads a state of the training loop, `zero` lists
the files that two ranks save under each ZeRO stage (needs DeepSpeed). What one process can't have is extrapolated in
docs/explanation/scale.md, which has the formulas. `seconds` are wall time, `processor_seconds` are those of the
measured process; only the latter mean anything on a busy machine.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_sweep import ROWS, measure, measure_report, measure_sweep, write_sweep
from mgcc_dist.common.files import write_json

LAUNCH = Path(__file__).parents[1] / "launch"
RANKS = 1000


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `call` and its processor seconds."""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def resident_mib() -> float:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_loader(images: int, shards: int, batches: int = 1000) -> dict[str, Any]:
    """Measure one rank of RANKS on an index of `images` images in `shards` shards, which have no content."""
    from mgcc_dist.data.loader import Ranks, Stream, StreamOffsets, TrainLoader
    from mgcc_dist.data.order import WindowedOrder, permutation
    from mgcc_dist.data.records import ShardFolder, write_index

    class IndicesOnly(TrainLoader[int]):
        def load(self, labeled: Any, unlabeled: Any, synthetic: Any = ()) -> int:
            return len(unlabeled)

    per_shard = images // shards
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        entries = []
        for shard in range(shards):
            name = f"shard-{shard:06d}.tar"
            records = [
                {"key": f"image-{i:08d}", "class": "benign", "labeled": False, "group": f"patient-{i // 2:08d}"}
                for i in range(shard * per_shard, (shard + 1) * per_shard)
            ]
            entries.append({"name": name, "bytes": 10240, "sha256": "0" * 64, "records": records})
            with (folder / name).open("wb") as file:
                file.truncate(10240)
        write_index(folder, "scale", entries)
        size = (folder / "index.json").stat().st_size
        del entries, records
        before = resident_mib()
        opened, index_seconds = timed(lambda: ShardFolder.open(folder, verify=False))
        memory = resident_mib() - before
    of_image = [record.shard for record in opened.records]
    rows: dict[str, Any] = {
        "index": {
            "images": images,
            "shards": shards,
            "file_mib": round(size / 2**20, 1),
            "processor_seconds": round(index_seconds, 2),
            "memory_mib": round(memory),
        }
    }
    del opened
    windowed, building = timed(lambda: WindowedOrder(np.unique(of_image, return_inverse=True)[1], 64))
    _, drawing = timed(lambda: windowed(0, 1, 0))
    rows["window of 64 shards"] = {
        "images": images,
        "processor_seconds": round(drawing, 2),
        "processor_seconds_once": round(building, 2),
    }
    many = 20 * images
    order, drawing = timed(lambda: permutation(0, 1, 0, many))
    rows["permutation"] = {"images": many, "processor_seconds": round(drawing, 2), "mib": round(order.nbytes / 2**20)}
    loader = IndicesOnly(None, Stream(range(many), 8), seed=0, ranks=Ranks(RANKS - 1, RANKS), augment="symmetries")
    stream = loader.batches(StreamOffsets())
    _, seconds = timed(lambda: [next(stream) for _ in range(batches)])
    rows["indices of a batch"] = {
        "images": 8,
        "ranks": RANKS,
        "processor_milliseconds": round(1e3 * seconds / batches, 3),
    }
    stream.close()
    for name, row in rows.items():
        print(f"{name}: {row}", flush=True)
    return rows


def measure_stragglers() -> dict[str, Any]:
    """Measure what rank 0 does with the times of RANKS ranks at a logged row."""
    from mgcc_dist.train.stragglers import slow_rank, slowest_ranks

    by_rank = [[0.01 * (rank % 7), 0.4] for rank in range(RANKS)]
    _, seconds = timed(lambda: [slow_rank(slowest_ranks(by_rank, 1.0)) for _ in range(100)])
    row = {"ranks": RANKS, "processor_milliseconds": round(10 * seconds, 3), "bytes_per_rank": 8}
    print(f"slow ranks: {row}", flush=True)
    return {"slow ranks": row}


def measure_checkpoint(width: int = 2048) -> dict[str, Any]:
    """Measure saving and loading the state of one rank without shards: weights, AdamW and EMA."""
    import torch
    from accelerate import Accelerator

    from mgcc_dist.train import checkpoints
    from mgcc_dist.train.checkpoints import TrainState
    from mgcc_dist.train.ema import Ema
    from mgcc_dist.train.weights import Weights, meta_copy

    accelerator = Accelerator(cpu=True)
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
    template = meta_copy(module)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1, width)).sum().backward()
    optimizer.step()
    prepared, optimizer = accelerator.prepare(module, optimizer)
    weights = Weights(prepared, optimizer, template, accelerator)
    ema = Ema(weights.shards, 0.9)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        _, saving = timed(lambda: checkpoints.save(folder, TrainState(step=1), weights, ema, accelerator, 1))
        saving_wall = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _, loading = timed(lambda: checkpoints.restore(folder, weights, ema, accelerator))
    row = {
        "parameters": parameters,
        "mib": round(size / 2**20, 1),
        "bytes_per_parameter": round(size / parameters, 3),
        "save_seconds": round(saving_wall, 2),
        "save_processor_seconds": round(saving, 2),
        "load_processor_seconds": round(loading, 2),
    }
    print(f"checkpoint: {row}", flush=True)
    return {"checkpoint": row}


def measure_zero(stages: list[int]) -> dict[str, Any]:
    """Measure the files of a checkpoint of two CPU ranks per ZeRO stage (0: DDP), in bytes per parameter."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = write_sweep(Path(scratch), ROWS)
        for stage in stages:
            out = Path(scratch) / f"zero{stage}"
            words = run_words(sweep, out, stage, Path(scratch))
            measure(words, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
            [checkpoint] = (out / "checkpoints").iterdir()
            parameters = json.loads((out / "result.json").read_text())["parameters"]["training"]
            files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*.*")}
            large = {name: size for name, size in files.items() if size > parameters / 4}
            rows[f"checkpoint, ZeRO-{stage}" if stage else "checkpoint, DDP"] = {
                "ranks": 2,
                "parameters": parameters,
                "bytes_per_parameter": {name: round(size / parameters, 2) for name, size in sorted(large.items())},
                "total_bytes_per_parameter": round(sum(files.values()) / parameters, 2),
            }
            print(list(rows.items())[-1], flush=True)
    return rows


def run_words(sweep: Path, out: Path, stage: int, scratch: Path) -> list[str]:
    """Return the arguments of python that train U-Net with AdamW on two CPU ranks."""
    from mgcc_dist.sweep.expansion import read_sweep

    run = read_sweep(sweep).runs[1]
    options = [word for word in run.command()[2:] if not word.startswith(("--network.widths", "--out"))]
    options += [
        "--network.widths=[32,64,64,64]",
        "--loop.steps=2",
        "--loop.optimizer=adamw",
        "--loop.precision=no",
        f"--out={out}",
    ]
    name = f"8gpu_zero{stage}" if stage else "cpu_2ranks"
    kind = ["--config_file", str(LAUNCH / "accelerate" / f"{name}.yaml")]
    if stage:
        settings = json.loads((LAUNCH / "deepspeed" / f"zero{stage}.json").read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # here all tensors are small
        (scratch / "zero.json").write_text(json.dumps(settings))
        kind += ["--deepspeed_config_file", str(scratch / "zero.json")]
    launch = ["-m", "accelerate.commands.launch", *kind, "--num_processes", "2", "--main_process_port", "0"]
    return [*launch, "-m", "mgcc_dist.segment", *options]


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "sweep": lambda options: measure_sweep(options.runs),
    "report": lambda options: measure_report(options.runs // 10) | measure_report(options.runs),
    "zero": lambda options: measure_zero([0, 1, 2, 3]),
    "loader": lambda options: measure_loader(options.images, options.images // 1000),
    "ranks": lambda options: measure_stragglers(),
    "checkpoint": lambda options: measure_checkpoint(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--runs", type=int, default=10_000, help="of the sweep")
    parser.add_argument("--images", type=int, default=500_000, help="of the index")
    options = parser.parse_args()
    logging.getLogger("mgcc_dist").setLevel(logging.WARNING)
    for stage in options.stages:
        rows = STAGES[stage](options)
        from mgcc_dist.common.environment import benchmark_header  # torch would count as memory of what is started

        known = json.loads(options.out.read_text())["rows"] if options.out.is_file() else {}
        write_json(options.out, {**benchmark_header("benchmarks.scale"), "rows": known | rows})
    print(f"scale: {options.out}")


if __name__ == "__main__":
    main()
