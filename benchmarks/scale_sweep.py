"""A sweep of made-up runs, and what planning, submitting, showing and reporting it costs."""

import copy
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

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
        own["best"]["images"] = "IMAGES"
        text = json.dumps(own, indent=1).replace('"IMAGES"', texts[number % VARIANTS])
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


def measure_report(runs: int, images: int = VALIDATION_IMAGES) -> dict[str, Any]:
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
    return {f"report, {runs} runs": row}
