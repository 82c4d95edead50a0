"""Curation: propose synthetic images to train on, and write a page on which a person accepts or rejects each one.

The paper's professionals selected 725 BUSI images by eye. This proposal selects images greedily by the highest

    score(i) = realism(i) x distance from i to the nearest image selected so far

(the weighted k-center heuristic of Dyer & Frieze 1985), i.e. realistic images that differ from those already selected.
Realism is a k-NN density: the samples are ranked by their distance to the k-th nearest training image, and the rank is
scaled to (0, 1], with 1 for the closest. All distances are Euclidean, between features (features.py).
Realism uses the training images so that the validation images remain independent for evaluating the result. This favors
copies, so near-copies from the audit are never proposed. A person can still accept one; the page marks it.
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
from scipy.stats import rankdata

from mgcc_dist.assessment.audit import AUDIT_FORMAT
from mgcc_dist.assessment.config import CurateConfig
from mgcc_dist.assessment.features import FeatureExtractor
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_object, write_json, write_text
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.selection import FORMAT, VERSION
from mgcc_dist.diffusion.images import ImageData

AUDIT_KEYS = ("nearest", "similarity", "near_copy")
THUMBNAIL_SIZE = 160  # pixels of the longer side, at most
Array = NDArray[np.float64]


def curate(
    config: CurateConfig, extractor: FeatureExtractor, images: ImageData, samples: Path, audit: Path, folder: Path
) -> dict[str, Any]:
    """Write `proposal.json` and `page.html` to `folder` and return the proposal. `audit` is the samples' audit.json.

    Raises:
        UserError: there is no audit of these samples, or there are fewer training images than `neighbours`.
    """
    shards = ShardFolder.open(samples)
    audit_rows = _read_audit(audit, shards, images)
    if len(images.train) < config.neighbours:
        raise UserError(
            f"neighbours: {config.neighbours} is more than the {len(images.train)} training images. "
            f"Pass --neighbours {len(images.train)} or less"
        )
    accelerator = Accelerator(cpu=True)
    synthetic, real = extractor.extract(shards, accelerator), extractor.extract(images.train, accelerator)
    distance = np.partition(cdist(synthetic, real), config.neighbours - 1, axis=1)[:, config.neighbours - 1]
    realism = rankdata(-distance, method="ordinal") / len(distance)
    eligible = np.array([not audit_rows[record.key]["near_copy"] for record in shards.records])
    order = weighted_k_center(synthetic, realism, eligible, config.count)
    place = {i: number for number, i in enumerate(order)}
    rows = [
        {
            "key": record.key,
            "place": place.get(i),
            "realism": round(float(realism[i]), 4),
            "distance": float(f"{distance[i]:.4g}"),
            **audit_rows[record.key],
        }
        for i, record in enumerate(shards.records)
    ]
    proposal = {
        "samples": shards.index.get("request"),
        "features": extractor.info,
        "neighbours": config.neighbours,
        "asked": config.count,
        "proposed": [rows[i]["key"] for i in order],
        "images": rows,
    }
    write_json(folder / "proposal.json", proposal)
    write_text(folder / "page.html", render_page(proposal, shards, images))
    return proposal


def weighted_k_center(features: Array, weights: Array, eligible: NDArray[np.bool_], count: int) -> list[int]:
    """Select at most `count` of the `eligible` rows of `features` [M,D]; return their indices in order of selection.

    Each step selects the row with the highest weight x distance to the nearest selected row.
    """
    order: list[int] = []
    nearest = np.ones(len(features))  # distance to the selected rows; the first one is selected by weight only
    remaining = eligible.copy()
    while remaining.any() and len(order) < count:
        selected = int(np.argmax(np.where(remaining, weights * nearest, -1.0)))
        distance = np.linalg.norm(features - features[selected], axis=1)
        nearest = np.minimum(nearest, distance) if order else distance
        order.append(selected)
        remaining[selected] = False
    return order


def render_page(proposal: dict[str, Any], shards: ShardFolder, images: ImageData) -> str:
    """Return the page as self-contained HTML."""
    index_of = {images.shards.records[i].key: i for i in images.train.indices}
    data = {
        "selection": {"format": FORMAT, "version": VERSION, "samples": proposal["samples"]},
        "asked": proposal["asked"],
        "images": [row | {"src": _data_url(shards[i].image)} for i, row in enumerate(proposal["images"])],
        "training": {
            key: _data_url(images.shards[index_of[key]].image)
            for key in sorted({row["nearest"] for row in proposal["images"]})
        },
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("curate.html").render(
        data=data, features=proposal["features"]["kind"], created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def _read_audit(path: Path, shards: ShardFolder, images: ImageData) -> dict[str, dict[str, Any]]:
    """Return the audit's row of each sample, by key.

    Raises:
        UserError: it is missing or damaged, or is about other samples or training images.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist. Run `mgcc ldm` with --audit.enabled true first.")
    audit = read_object(path)
    remedy = "Move it elsewhere and run `mgcc ldm` again to repeat the audit."
    try:
        request = audit["request"]
        if request.get("format") != AUDIT_FORMAT:
            raise UserError(f"{path}: was written by an earlier version. Run `mgcc ldm` again to repeat the audit.")
        rows = {row["key"]: {name: row[name] for name in AUDIT_KEYS} for row in audit["images"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error!r}). {remedy}") from error
    if request.get("samples") != shards.index.get("request") or any(row.key not in rows for row in shards.records):
        raise UserError(f"{path}: is the audit of other samples than {shards.folder}. Run `mgcc ldm` again.")
    train = {images.shards.records[i].key for i in images.train.indices}
    if unknown := {row["nearest"] for row in rows.values()} - train:
        raise UserError(f"{path}: {min(unknown)!r} is not a training image of {images.shards.folder}. {remedy}")
    return rows


def _data_url(image: NDArray[np.uint8]) -> str:
    """Return a thumbnail of `image` as a JPEG data URL."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
