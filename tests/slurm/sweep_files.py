"""Write small sweep files for the tests of `mgcc_dist.slurm`."""

from pathlib import Path

import toy_ldm
import yaml

SUPERVISED = {
    "method": {"name": "supervised"},
    "network": {"name": "unet"},
    "data": {"unlabeled": False, "batch_unlabeled": 0},
}


def write_sweep(folder: Path, name: str = "tiny", **changes) -> Path:
    """Write a sweep of U-Net and MGCC x three seeds, four steps each, on 24 phantoms of 16x16 that steps prepare."""
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


def write_ready_sweep(folder: Path, data: Path, name: str, steps: int = 30, image_size: int = 32, **changes) -> Path:
    """Write the sweep on `phantom_data`, without preparation steps; metrics are logged at every step."""
    content = yaml.safe_load(write_sweep(folder, name).read_text())
    defaults = content["defaults"]
    defaults["data"] |= {"shards": str(data / "shards"), "split": str(data / "split.json"), "image_size": image_size}
    defaults["loop"] |= {"steps": steps, "checkpoint_every": 5, "validate_every": 4}
    return write_sweep(folder, name, **{"defaults": defaults, "datasets": {"Phantom": {}}} | changes)


def write_two_node_sweep(
    folder: Path, data: Path, name: str, until: str = "autoencoder", environment: dict[str, str] | None = None
) -> Path:
    """Write a sweep of a diffusion model, a two-node job of one rank per node, and of an independent small run.

    Args:
        until: last stage of the diffusion model
        environment: more variables for it
    """
    config, ldm = folder / "ldm.yaml", folder / name / "ldm"
    config.write_text(toy_ldm.config(steps=30, checkpoint_every=7))
    resources = {"cpus": 1, "gpus": 0, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}}
    step = {
        "run": f"ldm --config {config} --out {ldm} --until {until}",
        "makes": str(ldm / until / "result.json"),
        "resources": resources | {"nodes": 2, "environment": {"OMP_NUM_THREADS": "1"} | (environment or {})},
    }
    return write_ready_sweep(
        folder,
        data,
        name,
        steps=1,
        seeds=[1],
        rows={"U-Net": SUPERVISED},
        reference=None,
        resources=resources,
        datasets={"Phantom": {"prepare": {"ldm": step}, "needs": []}},
    )
