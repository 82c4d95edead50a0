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
import copy
import io
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mgcc_dist.common.files import write_json

LAUNCH = Path(__file__).parents[1] / "launch"
RANKS = 1000
ROWS = 20
VALIDATION_IMAGES = 254
"""of BUSI"""
QUEUED, RUNNING = 1000, 256
MAX_ARRAY_SIZE = 1001
VARIANTS = 16
"""different lists of image scores; each run has a summary of its own"""
SLURM = {
    "scontrol": f"""case "$*" in
    "show config") echo "MaxArraySize = {MAX_ARRAY_SIZE}" ;;
    *) echo "PartitionName=debug Default=YES MaxTime=24:00:00" ;;
esac""",
    "sbatch": """[ "$1" = --test-only ] && exit 0
echo x >> "$FAKE_SLURM/submitted"
echo Submitted batch job $(wc -l < "$FAKE_SLURM/submitted")""",
    "srun": "",
    "squeue": 'cat "$FAKE_SLURM/queue"',
    "sacct": "",
}
"""stand-ins for Slurm's commands"""


def measure(words: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run `python WORDS` and return its time and memory.

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(words)}: {output.read().decode()[-2000:]}")
        size = output.seek(0, io.SEEK_END)
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_memory_mib": round(used.ru_maxrss / 1024),
        "output_kib": round(size / 1024),
    }


def write_sweep(folder: Path, runs: int) -> Path:
    """Write a sweep of ROWS rows, in pairs of U-Net and MGCC at different learning rates, and its data."""
    data, split = folder / "data", folder / "split.json"
    for words in (f"phantom --count 24 --size 16 --out {data}", f"split --root {data} --out {split}"):
        measure(["-m", "mgcc_dist.shards", *words.split()], {})
    supervised = {"method": {"name": "supervised"}, "network": {"name": "unet"}}
    supervised["data"] = {"unlabeled": False, "batch_unlabeled": 0}  # type: ignore[dict-item]
    rows = {}
    for index in range(ROWS):
        keys = copy.deepcopy(supervised) if index % 2 else {}
        name = f"{'U-Net' if index % 2 else 'MGCC'} {index // 2}"
        rows[name] = {**keys, "loop": {"learning_rate": 0.01 + index / 1e4}}
    content = {
        "title": "Scale",
        "out": str(folder / "out"),
        "preset": "mgcc_demo",
        "reference": "MGCC 0",
        "seeds": list(range(1, runs // ROWS + 1)),
        "resources": {"cpus": 1, "memory_gb": 1, "time": "0:20:00"},
        "defaults": {
            "data": {"shards": str(data), "split": str(split), "synthetic": None, "image_size": 16, "workers": 0}
            | {"batch_labeled": 2, "batch_unlabeled": 2},
            "network": {"widths": [4, 8, 8, 8]},
            "loop": {"epochs": None, "steps": 4, "log_every": 1, "validate_every": 100, "tracker": "none"},
        },
        "datasets": {"Phantom": {}},
        "rows": rows,
    }
    path = folder / "scale.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def train_one(sweep: Path) -> Path:
    """Train the first run of the sweep; return its folder."""
    from mgcc_dist.sweep.expansion import read_sweep

    run = read_sweep(sweep).runs[0]
    measure([*run.command(), "--out", str(run.folder)], {})
    return run.folder


def write_runs(sweep: Path, real: Path, finished: int, unfinished: int, images: int) -> None:
    """Write the folders of the first runs of the sweep: the files of the real one, with other scores."""
    from mgcc_dist.common.config import as_yaml
    from mgcc_dist.sweep.expansion import read_sweep

    result = json.loads((real / "result.json").read_text())
    metrics = (real / "metrics.jsonl").read_text().splitlines()
    rows = "".join(line + "\n" for line in metrics * (70 // len(metrics)))
    draw = random.Random(0)
    texts = []
    for _ in range(VARIANTS):
        scores = [
            {**copy.deepcopy(image), "key": f"image_{index}", "group": f"image_{index}"}
            for index, image in enumerate((result["best"]["images"] * images)[:images])
        ]
        for image in scores:
            image["corrected"]["iou"] = draw.random()
        texts.append(json.dumps(scores, indent=1))
    for number, run in enumerate(read_sweep(sweep).runs[: finished + unfinished]):
        run.folder.mkdir(parents=True, exist_ok=True)
        header = "schema_version: 2\n"
        (run.folder / "config.yaml").write_text(header + as_yaml(run.config).removeprefix(header))
        (run.folder / "metrics.jsonl").write_text(rows)
        if number >= finished:
            continue
        own = copy.deepcopy(result) | {"method": run.config.method.name, "seed": run.seed}
        own["network"]["name"] = run.config.network.name
        for which in ("best", "last"):
            own[which]["summary"]["corrected"]["iou"] = draw.random()
            own[which]["images"] = f"IMAGES {which}"
        text = json.dumps(own, indent=1)
        for which, offset in (("best", 0), ("last", 1)):
            text = text.replace(f'"IMAGES {which}"', texts[(number + offset) % VARIANTS])
        (run.folder / "result.json").write_text(text)


def write_queue(sweep: Path, slurm: Path) -> None:
    """Let the stand-in for squeue list every run without a result: some running, the others pending."""
    from mgcc_dist.sweep.expansion import read_sweep

    content = read_sweep(sweep)
    jobs = json.loads((content.out / "jobs.json").read_text())["jobs"]
    waiting = [run.folder for run in content.runs if not (run.folder / "result.json").is_file()]
    ids = [jobs[str(folder.relative_to(content.out))] for folder in waiting] + [jobs["report"]]
    lines = [
        f"{job}|{'RUNNING|n1|None' if number < RUNNING else 'PENDING||Resources'}\n" for number, job in enumerate(ids)
    ]
    (slurm / "queue").write_text("".join(lines))


def measure_sweep(runs: int) -> dict[str, Any]:
    """Measure planning, submitting and watching a sweep of `runs` runs, of which QUEUED are not finished yet."""
    rows: dict[str, Any] = {}
    queued = min(QUEUED, runs // 2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        slurm = folder / "slurm"
        slurm.mkdir()
        for name, script in SLURM.items():
            (slurm / name).write_text(f"#!/bin/sh\n{script}\n")
            (slurm / name).chmod(0o755)
        (slurm / "queue").write_text("")
        environment = {"PATH": f"{slurm}:{os.environ['PATH']}", "FAKE_SLURM": str(slurm)}
        sweep = write_sweep(folder, runs)

        def step(name: str, *words: str) -> None:
            rows[name] = {"runs": runs, **measure(["-m", *words, str(sweep)], environment)}
            print(f"{name}: {rows[name]}", flush=True)

        step("plan", "mgcc_dist.sweeps")
        step("dry run", "mgcc_dist.slurm", "submit", "--dry-run")
        step("submit", "mgcc_dist.slurm", "submit")
        rows["submit"]["sbatch_calls"] = len((slurm / "submitted").read_text().split())
        write_runs(sweep, train_one(sweep), runs - queued, min(RUNNING, queued), images=1)
        write_queue(sweep, slurm)
        step("status", "mgcc_dist.slurm", "status")
        step("submit again", "mgcc_dist.slurm", "submit")
    return rows


def measure_report(runs: int, images: int) -> dict[str, Any]:
    """Measure the report of a sweep of `runs` finished runs, each with the scores of `images` images."""
    with tempfile.TemporaryDirectory() as scratch:
        sweep, page = write_sweep(Path(scratch), runs), Path(scratch) / "report.html"
        write_runs(sweep, train_one(sweep), runs, 0, images)
        row = {
            "runs": runs,
            "images": images,
            **measure(["-m", "mgcc_dist.report", "--sweep", str(sweep), "--out", str(page)], {}),
        }
        row["page_mib"] = round(page.stat().st_size / 2**20, 1)
    print(f"report: {row}", flush=True)
    return {f"report, {images} images": row}


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
    from mgcc_dist.data.loader import StreamOffsets, TrainLoader
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
    loader = IndicesOnly((0, many), (0, 8), 0, RANKS - 1, RANKS, 0, "symmetries")
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
    "report": lambda options: measure_report(options.runs, 25) | measure_report(options.runs // 10, VALIDATION_IMAGES),
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
