"""Sweep files at a toy size, for the dispatcher's tests."""

from pathlib import Path

import yaml

SUPERVISED = {
    "method": {"name": "supervised"},
    "network": {"name": "unet"},
    "data": {"unlabeled": False, "batch_unlabeled": 0},
}


def write_sweep(folder: Path, name: str = "tiny", **changes) -> Path:
    """U-Net and MGCC x three seeds on 24 phantoms of 16x16, four steps each; shards and split are made before."""
    shards, split = folder / "shards", folder / "split.json"
    content = {
        "title": "Toy",
        "out": str(folder / name),
        "preset": "mgcc_demo",
        "reference": "MGCC",
        "seeds": [1, 2, 3],
        "resources": {"cpus": 1, "memory_gb": 1, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}},
        "defaults": {
            "data": {"shards": str(shards), "split": str(split), "synthetic": None, "image_size": 16, "workers": 0}
            | {"batch_labeled": 2, "batch_unlabeled": 2},
            "network": {"widths": [4, 8, 8, 8]},
            "loop": {"epochs": None, "steps": 4, "log_every": 1, "validate_every": 100, "checkpoint_every": 2},
        },
        "datasets": {
            "Phantom": {
                "prepare": {
                    "shards": {
                        "run": f"shards phantom --count 24 --size 16 --out {shards}",
                        "makes": str(shards / "index.json"),
                    },
                    "split": {"run": f"shards split --root {shards} --out {split}", "makes": str(split)},
                }
            }
        },
        "rows": {"U-Net": SUPERVISED, "MGCC": {}},
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
