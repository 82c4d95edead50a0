"""Finished runs with made-up scores, for the sections of the report."""

import json

import numpy as np
import yaml
from sweep_runs import scores

from mgcc_dist.evaluation.metrics import summarize
from mgcc_dist.reporting.labels import name_groups
from mgcc_dist.reporting.runs import find_runs, group_runs

METHODS = {
    "unet": ("supervised", {"name": "unet"}),
    "mt": ("mean_teacher", {"name": "unet"}),
    "cps": ("cps", {"name": "unet"}),
    "mgcc": ("mgcc", {"name": "mgcc"}),
}


def image(key, value, group=None, lesion=True):
    """Scores of one image under all metrics, with the group of its record."""
    return scores(key, value, lesion) | {"group": group or key}


def fold_images(fold, values):
    """Images of one fold; two neighbours are of one patient."""
    return [image(f"{fold}-{i}", value, f"{fold}-{i // 2}") for i, value in enumerate(values)]


def scored(images):
    return {"step": 5, "epoch": 1.0, "summary": summarize(images), "images": images}


def make(folder, method, split, test=(), seed=1, labeled=10, data=None, external=None, dataset="busi", **result):
    """Write a finished run whose test images are `test`; `data` are keys of its config's section."""
    name, network = METHODS[method]
    config = {
        "data": {"shards": dataset, "split": split, "image_size": 64, **(data or {})},
        "loop": {"seed": seed, "epochs": 2},
        "network": network,
        "method": {"name": name},
        "out": str(folder),
    }
    if name == "supervised":
        config["data"]["batch_unlabeled"] = 0
    validation = scored([image(f"val of {split} {seed}", 0.99)])  # runs with equal validation scores are repeats
    best = validation | {"test": scored(list(test))}
    best["external"] = {other: scored(images) for other, images in (external or {}).items()}
    content = {
        "program": "segment",
        "method": name,
        "network": network,
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "images": {"labeled": labeled, "unlabeled": 20, "validation": 1, "test": len(test)},
        "best": best,
        "last": validation,
        **result,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def make_folds(folder, levels, folds=5, images=12):
    """Five folds of each method; images scatter around the method's level, and fold k has k more of them."""
    for method, level in levels.items():
        for fold in range(1, folds + 1):
            noise = np.random.default_rng([fold, len(method)]).normal(size=images + fold)
            values = np.clip(level + 0.02 * noise, 0, 1)
            make(folder / "folds" / f"{method}_{fold}", method, f"busi_fold_{fold}", fold_images(fold, values))


def rows_of(*folders):
    """The named groups of all runs below `folders`."""
    return name_groups(group_runs(find_runs(folders).segmentation), {})


def texts(view, row):
    return [cell.text for cell in dict(view.rows)[row]]
