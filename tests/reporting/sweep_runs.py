"""Write a small sweep file and finished runs of it with made-up scores."""

import functools
import json
import operator

import numpy as np
import yaml

from mgcc_dist.common.config import as_plain
from mgcc_dist.evaluation.metrics import summarize
from mgcc_dist.sweep.expansion import read_sweep

METRICS = ("iou", "recall", "precision", "f1")
SUPERVISED = {"method": {"name": "supervised"}, "network": {"name": "unet"}, "data": {"batch_unlabeled": 0}}
SWEEP = {
    "title": "A title & more",
    "paper": "table_I",
    "out": "out/sweeps/small",
    "preset": "mgcc_busi",
    "reference": "MGCC",
    "seeds": [1, 2],
    "datasets": {"BUSI": {"data": {"split": "busi_random_{split}"}}},
    "rows": {"U-Net": SUPERVISED, "CPS": {"method": {"name": "cps"}, "network": {"name": "unet"}}, "MGCC": {}},
    "notes": "Scope & limits_.",
}


def make_sweep(folder, **changes):
    """Write the sweep file with `changes` and return its path."""
    path = folder / "small.yaml"
    content = {**SWEEP, "out": str(folder / "out"), **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def scores(key, value, lesion=True):
    """Scores of one image, with the same value for all metrics."""
    same = dict.fromkeys(METRICS, float(value))
    return {
        "key": key,
        "paper": same,
        "corrected": same,
        "lesion": same if lesion else None,
        "predicted_empty": False,
    }


def finish(run, images, folder=None, **keys):
    """Write a finished run folder; `keys` such as loop__optimizer__momentum=0.5 override its config."""
    folder = folder or run.folder
    config = as_plain(run.config)
    for key, value in keys.items():
        *sections, name = key.split("__")
        functools.reduce(operator.getitem, sections, config)[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scored = {"step": 5, "epoch": 1.0, "summary": summarize(images), "images": images}
    result = {
        "program": "segment",
        "method": config["method"]["name"],
        "network": config["network"],
        "dataset": run.dataset,
        "split": config["data"]["split"],
        "seed": run.seed,
        "best": scored,
        "last": scored,
    }
    (folder / "result.json").write_text(json.dumps(result))


def begin(run):
    """Write the folder of an unfinished run."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(as_plain(run.config)))


def finish_all(path, levels, images=40, spread=0.05, skip=(), shuffle=False):
    """Finish all runs of a sweep except (row, seed) in `skip`; image scores scatter around the row's level."""
    for run in read_sweep(path).runs:
        if (run.row, run.seed) in skip:
            continue
        rng = np.random.default_rng([run.seed, len(run.row)])
        values = np.clip(levels[run.row] + spread * rng.normal(size=images), 0, 1)
        # 20 of the 40 images are also in the other seed's split.
        scored = [scores(f"image {i + 20 * run.seed:03d}", value, i % 4 > 0) for i, value in enumerate(values)]
        if shuffle:
            rng.shuffle(scored)
        finish(run, scored)
