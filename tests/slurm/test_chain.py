"""The pipeline of Table III, from raw images to the report, in one submission."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from jobs import dispatch
from PIL import Image

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.files import read_json
from mgcc_dist.data.phantom import draw
from mgcc_dist.sweep.expansion import read_sweep

pytestmark = pytest.mark.slurm

# The demo preset's programs and networks, with few steps.
LDM = (
    "ldm --preset demo --data.image_size 32 --data.workers 0 --autoencoder.loop.steps 6 --denoiser.loop.steps 6 "
    "--sampling.count 8 --sampling.steps 3 --quality.neighbours 2"
)
SEGMENT = {
    "data": {"image_size": 32, "workers": 0},
    "loop": {"epochs": None, "steps": 4, "validate_every": 100},
}


def write_busi(folder: Path, count: int, size: int) -> Path:
    """Write phantoms as image files in BUSI's layout."""
    numbers: Counter[str] = Counter()
    for index in range(count):
        phantom = draw(0, index, size)
        numbers[phantom.category] += 1
        stem = folder / phantom.category / f"{phantom.category} ({numbers[phantom.category]})"
        stem.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantom.image).save(f"{stem}.png")
        Image.fromarray(phantom.mask).save(f"{stem}_mask.png")
    return folder


def test_one_submission_runs_the_pipeline_from_raw_images_to_the_report(slurm_up, tmp_path):
    raw = write_busi(tmp_path / "Dataset_BUSI_with_GT", count=40, size=32)
    text = (CONFIGS / "sweeps" / "table_3_demo.yaml").read_text()
    text = text.replace("shards phantom --count 400 --size 64", f"shards busi --root {raw} --size 32")
    text = text.replace("ldm --preset demo", LDM).replace("out/", f"{tmp_path}/")
    resources = {"cpus": 1, "memory_gb": 2, "environment": {"OMP_NUM_THREADS": "1"}}
    sweep = tmp_path / "chain.yaml"
    content = yaml.safe_load(text) | {"seeds": [1], "defaults": SEGMENT, "resources": resources}
    del content["rows"]["MT"]  # the same tasks as MGCC
    stages = content["datasets"]["Phantom"]["prepare"]["ldm"]["makes"]
    del stages["autoencoder"], stages["samples"]  # which the next task then makes
    sweep.write_text(yaml.safe_dump(content))

    assert "7 tasks submitted in 7 jobs" in dispatch("submit", sweep)
    assert "7 tasks: 7 done" in dispatch("status", sweep, "--watch", "--every", "2")
    assert "2 of 2 runs are finished" in dispatch("logs", sweep, "report")
    counts = {run.row: read_json(run.folder / "result.json")["images"] for run in read_sweep(sweep).runs}
    assert "synthetic" not in counts["U-Net"]
    assert counts["MGCC"]["synthetic"] == 8
    ldm = tmp_path / "table_3_demo" / "ldm_1"
    assert all(
        (ldm / output).is_file() for output in ("samples/index.json", "quality/quality.json", "audit/audit.json")
    )
