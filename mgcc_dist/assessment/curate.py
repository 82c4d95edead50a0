"""Which synthetic images to train on: a proposal, and a page on which a person accepts or rejects each image.

The paper's professionals chose 725 BUSI images by eye. What is proposed to them here is chosen by

    score(i) = realism(i) x distance from i to the nearest image chosen so far

greedily, the best score first (the weighted k-centre heuristic of Dyer & Frieze 1985): realistic images that are unlike
those chosen before. realism is the rank, 1 for the best and near 0 for the worst, of the samples by their distance to
the k-th nearest training image (a k-NN density). Distances are Euclidean, between features (features.py says of what).
Realism is taken from the training images so that the held-out ones stay fit to measure the result with; that favours
copies, so what the audit lists as near-copies is never proposed. A person can still accept one, marked as such.
"""

import base64
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import cdist

from mgcc_dist.assessment.config import CurateConfig
from mgcc_dist.assessment.features import Features
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, write_json, write_text
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.selection import FORMAT, VERSION
from mgcc_dist.diffusion.images import Images

THUMBNAIL = 160  # pixels a side at most
Array = NDArray[np.float64]


def curate(
    config: CurateConfig, features: Features, images: Images, samples: Path, audit: Path, folder: Path
) -> dict[str, Any]:
    """Leave `proposal.json` and `page.html` in `folder`, and return the first; `audit` is the samples' audit.json.

    Raises:
        UserError: there is no audit of these samples, or there are fewer training images than `neighbours`.
    """
    shards = ShardFolder.open(samples)
    audited = _audited(audit, shards)
    if len(images.learned) < config.neighbours:
        raise UserError(f"curate: {len(images.learned)} training images have no neighbour number {config.neighbours}")
    accelerator = Accelerator(cpu=True)
    synthetic, real = features.of(shards, accelerator), features.of(images.learned, accelerator)
    distance = np.partition(cdist(synthetic, real), config.neighbours - 1, axis=1)[:, config.neighbours - 1]
    realism = ranks(-distance)
    copies = {key for key, row in audited.items() if row["near_copy"]}
    allowed = np.array([key not in copies for key in shards.keys()])  # noqa: SIM118 (a ShardFolder is no dict)
    order = propose(synthetic, realism, allowed, config.count)
    place = {i: number for number, i in enumerate(order)}
    rows = [
        {
            "key": record.key,
            "place": place.get(i),
            "realism": round(float(realism[i]), 4),
            "distance": float(f"{distance[i]:.4g}"),
            **{name: audited[record.key][name] for name in ("nearest", "similarity", "near_copy")},
        }
        for i, record in enumerate(shards.records)
    ]
    proposal = {
        "samples": shards.index["request"],
        "features": features.facts,
        "neighbours": config.neighbours,
        "asked": config.count,
        "proposed": [rows[i]["key"] for i in order],
        "images": rows,
    }
    write_json(folder / "proposal.json", proposal)
    write_text(folder / "page.html", page(proposal, shards, images))
    return proposal


def ranks(values: Array) -> Array:
    """Rank of each value over their number: 1 for the highest, 1/N for the lowest."""
    return (np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1) / len(values)


def propose(features: Array, realism: Array, allowed: NDArray[np.bool_], count: int) -> list[int]:
    """Numbers of at most `count` of the `allowed` rows of `features` [M,D], in the order in which they are chosen."""
    order: list[int] = []
    nearest = np.ones(len(features))  # to what is chosen; the first is chosen by realism alone
    left = allowed.copy()
    while left.any() and len(order) < count:
        chosen = int(np.argmax(np.where(left, realism * nearest, -1.0)))
        distance = np.linalg.norm(features - features[chosen], axis=1)
        nearest = np.minimum(nearest, distance) if order else distance
        order.append(chosen)
        left[chosen] = False
    return order


def page(proposal: dict[str, Any], shards: ShardFolder, images: Images) -> str:
    """The page as HTML that needs no other file and no network."""
    where = {images.data.records[i].key: i for i in images.learned.indices}
    data = {
        "selection": {"format": FORMAT, "version": VERSION, "samples": proposal["samples"]},
        "asked": proposal["asked"],
        "images": [row | {"src": _picture(shards.read(i).image)} for i, row in enumerate(proposal["images"])],
        "training": {
            key: _picture(images.data.read(where[key]).image)
            for key in sorted({row["nearest"] for row in proposal["images"]})
        },
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("curate.html").render(
        data=data, features=proposal["features"]["kind"], made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def _audited(path: Path, shards: ShardFolder) -> dict[str, dict[str, Any]]:
    """The audit's row of each sample, by its key."""
    if not path.is_file():
        raise UserError(f"curate: {path} is not there; run `python -m mgcc_dist.ldm` with --audit.enabled true first")
    audit = read_json(path)
    rows = {row["key"]: row for row in audit["images"]}
    if audit["request"]["samples"] != shards.index["request"] or not set(shards.keys()) <= rows.keys():
        raise UserError(f"curate: {path} is of other samples than {shards.folder}; run `python -m mgcc_dist.ldm` again")
    return rows


def _picture(image: NDArray[np.uint8]) -> str:
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
