"""Predict and score all images of an evaluation, divided over the ranks: the work of `mgcc evaluate`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset, Subset

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.datasets import ResizedDataset, SampleDataset, subset_by_keys
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.workers import load_in_order
from mgcc_dist.evaluation import threshold as thresholds
from mgcc_dist.evaluation.calibration import Array, brier, confidence, reliability_bins
from mgcc_dist.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.evaluation.postprocess import Postprocess, choose, setting_scores
from mgcc_dist.evaluation.summary import NAMES, Row
from mgcc_dist.evaluation.surface import surface_scores
from mgcc_dist.evaluation.temperature import calibrate, logit_histogram
from mgcc_dist.inference.ensemble import Ensemble
from mgcc_dist.inference.uncertainty import Members

MM = {"hd95": "hd95", "asd": "assd", "nsd": "nsd"}
"""surface metrics that are also computed in mm, and their names"""
Condition = tuple[str, int]
"""name and strength of a corruption"""
CONDITIONS: list[Condition] = [(name, strength) for name in CORRUPTIONS for strength in range(1, STRENGTHS + 1)]


@dataclass(frozen=True)
class Scores:
    """The scored images of all ranks."""

    rows: list[Row]
    """one per image, sorted by data set and key; see `image_row`"""
    bins: list[Array]
    """`reliability_bins` of each image"""
    indices: list[int]
    """its index into the data"""
    postprocess: Postprocess
    """what was done to the masks"""
    threshold: float = thresholds.DEFAULT
    """above which a pixel is lesion"""
    corrupted: dict[Condition, list[Row]] = field(default_factory=dict)
    """rows under each corruption, without surface distances"""
    histograms: list[Array] = field(default_factory=list)
    """`logit_histogram` of each image, if a temperature is to be fitted"""


class _Scored(NamedTuple):
    """One scored image."""

    row: Row
    bins: Array
    data_index: int
    corrupted: list[Row]
    histogram: Array | None


def open_records(
    folders: Sequence[ShardFolder], keys: Sequence[str] | None, size: int | None, by_shard: bool = False
) -> SampleDataset:
    """Return the records to evaluate: `keys` of the only folder, or all of all folders; as squares of `size`, if given.

    `by_shard` orders the keys as in the folder, which reads one shard after the other.

    Raises:
        UserError: a record has no mask, a key is missing, there is no record, or two folders have the same data set.
    """
    names = [folder.dataset for folder in folders]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"--shards: two folders are called {repeated!r}, and results are by name. Convert one with another --name."
        )
    chosen = [Subset(folder, range(len(folder))) for folder in folders]
    if keys is not None:
        chosen = [subset_by_keys(folders[0], keys, by_shard)]
    for subset, folder in zip(chosen, folders, strict=False):
        records = [folder.records[index] for index in subset.indices]
        if not records:
            raise UserError(f"{folder.folder}: no images to evaluate. Choose another --subset.")
        if unmasked := [record.key for record in records if not record.labeled]:
            raise UserError(
                f"{folder.folder}: {len(unmasked)} of {len(records)} records have no mask, the first is "
                f"{unmasked[0]!r}. Choose a --split and --subset of labeled images."
            )
    data: SampleDataset = ConcatDataset(chosen)
    return ResizedDataset(data, size) if size else data


class Evaluation:
    """Predicts and scores the records of `data`, each on one rank.

    Args:
        batch: images per forward pass.
        workers: processes that read images.
        tolerance: of NSD, in pixels, and in mm where the pixel spacing is known.
        in_mm: whether images have the proportions of the stored ones, so that distances in mm can be computed.
        conditions: corruptions under which all images are scored too.
        seed: of the corruptions.
        members: whose agreement is the column `score`.
        temperature: of the probabilities; masks do not depend on it.
        logits: whether to return histograms of the logits.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        data: SampleDataset,
        accelerator: Accelerator,
        batch: int = 8,
        workers: int = 0,
        tolerance: float = 2.0,
        in_mm: bool = True,
        conditions: Sequence[Condition] = (),
        seed: int = 0,
        members: Members | None = None,
        temperature: float = 1.0,
        logits: bool = False,
    ) -> None:
        self.ensemble = ensemble
        self.data = data
        self.accelerator = accelerator
        self.workers = workers
        self.tolerance = tolerance
        self.in_mm = in_mm
        self.conditions = conditions
        self.seed = seed
        self.members = members
        self.temperature = temperature
        self.logits = logits
        indices = range(accelerator.process_index, len(data), accelerator.num_processes)
        self.batches = [indices[start : start + batch] for start in range(0, len(indices), batch)]
        self.images = len(indices)

    def run(self, postprocess: Postprocess | None, threshold: float | None = thresholds.DEFAULT) -> Scores:
        """Score all images; None first chooses what is best on them: the threshold, then post-processing. Collective.

        Raises:
            UserError: a record can't be read, or a network's output is not finite.
        """
        passes = 1 + len(self.conditions) + (postprocess is None) + (threshold is None)
        with ProgressBar(passes * len(self.data), "evaluating", "images", share=passes * self.images) as bar:
            if threshold is None:
                with raise_on_all_ranks():
                    scores = list(self._compare(thresholds.threshold_scores, bar))
                threshold = thresholds.choose(gather_object(scores))
            if postprocess is None:
                score = partial(_post_processing_scores, threshold=threshold)
                with raise_on_all_ranks():
                    scores = list(self._compare(score, bar))
                postprocess = choose(gather_object(scores))
            with raise_on_all_ranks():
                scored = list(self._score(postprocess, threshold, bar))
        everything: list[_Scored] = sorted(
            gather_object(scored), key=lambda each: (each.row["dataset"], each.row["key"])
        )
        return Scores(
            [each.row for each in everything],
            [each.bins for each in everything],
            [each.data_index for each in everything],
            postprocess,
            threshold,
            {condition: [each.corrupted[i] for each in everything] for i, condition in enumerate(self.conditions)},
            [each.histogram for each in everything if each.histogram is not None],
        )

    def _compare(
        self, score: Callable[[np.ndarray, np.ndarray], list[float]], bar: ProgressBar
    ) -> Iterator[list[float]]:
        """Yield for each image the scores of several settings, from probability and truth."""
        for samples in self._load():
            for sample, probability in zip(samples, self._predict(samples), strict=True):
                yield score(probability, truth_of(sample))
                bar.update()

    def _score(self, postprocess: Postprocess, threshold: float, bar: ProgressBar) -> Iterator[_Scored]:
        for indices, samples in zip(self.batches, self._load(), strict=True):
            scored = []
            for index, sample, probability in zip(indices, samples, self._predict(samples), strict=True):
                truth, mask = truth_of(sample), postprocess(probability > threshold)
                histogram = logit_histogram(probability, truth) if self.logits else None
                probability = calibrate(probability, self.temperature)
                row = image_row(sample, probability, mask) | surface_row(sample, mask, self.tolerance, self.in_mm)
                scored.append(_Scored(row, reliability_bins(probability, truth), index, [], histogram))
                bar.update()
            if self.members:
                scores = self.members.scores([sample.image for sample in samples], _names(samples))
                for each, score in zip(scored, scores, strict=True):
                    each.row["score"] = score
            for name, strength in self.conditions:
                keys = [f"{sample.meta['dataset']}/{sample.key}" for sample in samples]
                change = partial(corrupt, keys=keys, name=name, strength=strength, seed=self.seed)
                probabilities = self._predict(samples, change)
                for sample, probability, each in zip(samples, probabilities, scored, strict=True):
                    mask = postprocess(probability > threshold)
                    each.corrupted.append(image_row(sample, calibrate(probability, self.temperature), mask))
                    bar.update()
            yield from scored

    def _load(self) -> Iterator[list[Sample]]:
        load = partial(_read_batch, self.data, self.batches)
        yield from load_in_order(load, range(len(self.batches)), min(self.workers, len(self.batches)))

    def _predict(
        self, samples: Sequence[Sample], change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> list[np.ndarray]:
        return self.ensemble.probabilities([sample.image for sample in samples], _names(samples), change)


def _post_processing_scores(probability: np.ndarray, truth: np.ndarray, threshold: float) -> list[float]:
    return setting_scores(probability > threshold, truth)


def _names(samples: Sequence[Sample]) -> list[str]:
    return [repr(sample.key) for sample in samples]


def truth_of(sample: Sample) -> np.ndarray:
    """Return the mask of a labeled sample as bool [H,W]."""
    assert sample.mask is not None
    return sample.mask > 0


def image_row(sample: Sample, probability: np.ndarray, mask: np.ndarray) -> Row:
    """Describe and score one image: a row of images.csv, without surface distances.

    Areas are shares of the image. `iou` to `precision` follow the corrected protocol, `paper_...` the paper's.
    """
    truth, meta = truth_of(sample), sample.meta
    scores = score_image(mask, truth, surface=False)
    return {
        "dataset": meta["dataset"],
        "key": sample.key,
        "class": meta["class"],
        "group": meta["group"],
        "device": meta.get("device"),
        "height": truth.shape[0],
        "width": truth.shape[1],
        "lesion": bool(truth.any()),
        "lesion_area": float(truth.mean()),
        "predicted_area": float(mask.mean()),
        **{NAMES.get(name, name): value for name, value in scores["corrected"].items()},
        **{f"paper_{NAMES.get(name, name)}": value for name, value in scores["paper"].items()},
        "confidence": confidence(probability, mask),
        "brier": brier(probability, truth),
    }


def surface_row(sample: Sample, mask: np.ndarray, tolerance: float, in_mm: bool = True) -> Row:
    """Score the contour of one image in pixels and, with `in_mm` and where the spacing is known, in mm (else None)."""
    truth = truth_of(sample)
    row: Row = {NAMES.get(name, name): value for name, value in surface_scores(mask, truth, tolerance).items()}
    spacing = _spacing(sample) if in_mm else None
    millimetres = surface_scores(mask, truth, tolerance, spacing) if spacing else {}
    return row | {f"{name}_mm": millimetres.get(key) for key, name in MM.items()}


def _spacing(sample: Sample) -> tuple[float, float] | None:
    """Return height and width of a pixel of the (perhaps stretched) stored image in mm, if the record knows it."""
    known = sample.meta.get("pixel_spacing")
    if known is None:
        return None
    (width, height), (rows, columns) = sample.meta["original_size"], sample.image.shape
    return known[1] * height / rows, known[0] * width / columns


def _read_batch(data: SampleDataset, batches: Sequence[range], number: int) -> list[Sample]:
    return [data[index] for index in batches[number]]
