"""Open what an evaluation reads: runs, shard folders, a split, and the post-processing that another one chose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_versioned, sha256_of
from mgcc_dist.data.datasets import SampleDataset
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.shard_cache import open_cache
from mgcc_dist.data.splits import SUBSETS, Split, locate_split, read_split
from mgcc_dist.evaluation import threshold as thresholds
from mgcc_dist.evaluation.config import EvaluateConfig
from mgcc_dist.evaluation.postprocess import Postprocess, parse
from mgcc_dist.evaluation.summary import FORMAT, SUMMARY, VERSION
from mgcc_dist.evaluation.temperature import read_temperature
from mgcc_dist.inference.ensemble import Ensemble
from mgcc_dist.inference.evaluation import open_records
from mgcc_dist.inference.predictor import Predictor, load
from mgcc_dist.inference.uncertainty import Members, open_members
from mgcc_dist.train.initial_weights import shipped_models


@dataclass(frozen=True)
class Inputs:
    ensemble: Ensemble
    data: SampleDataset
    postprocess: Postprocess | None
    """None: to be chosen on the evaluated images"""
    threshold: float | None
    """None: to be chosen on the evaluated images"""
    request: dict[str, Any]
    """everything that the scores depend on"""
    runs: list[dict[str, Any]]
    """`run_info` of each run"""
    members: Members | None
    """whose agreement is the score of an image"""
    temperature: float
    notes: list[str]
    """what a reader of the scores must know about the images"""


def open_inputs(config: EvaluateConfig, accelerator: Accelerator) -> Inputs:
    """Load the runs and open the shards; one rank per node verifies checksums.

    Raises:
        UserError: a run, shard folder, split or setting does not exist or does not fit the others.
    """
    predictors = [
        load(run, config.weights, accelerator.device, config.precision, config.kernels) for run in config.runs
    ]
    for run, predictor in zip(config.runs, predictors, strict=True):
        if config.size and predictor.fit != "stretch":
            raise UserError(
                f"--size: stretches images, and {run} was trained with data.fit {predictor.fit}. Leave out --size."
            )
    hashes = [predictor.info["weights_sha256"] for predictor in predictors]
    if repeated := [run for run, sha256 in zip(config.runs, hashes, strict=True) if hashes.count(sha256) > 1]:
        raise UserError(f"--runs: {' and '.join(map(str, repeated))} have the same weights. Name each run once.")
    members = open_members(config.uncertainty, predictors, config.members, config.weights)
    temperature = _read_temperature(config, predictors)
    cache = open_cache(config.cache, config.cache_gb)
    folders = [ShardFolder.open(folder, accelerator.is_local_main_process, cache) for folder in config.shards]
    split, keys = _read_subset(config)
    postprocess = _read_postprocess(config.postprocess)
    threshold = _read_threshold(config.threshold)
    runs = [predictor.info for predictor in predictors]
    request = {
        "weights": [info["weights_sha256"] for info in runs],
        "shards": [folder.index_sha256 for folder in folders],
        "split": sha256_of(locate_split(config.split)) if config.split else None,
        "subset": config.evaluated,
        "tta": sorted(config.tta),
        "postprocess": "choose" if postprocess is None else str(postprocess),
        "threshold": "choose" if threshold is None else None if threshold == thresholds.DEFAULT else threshold,
        "corruptions": config.seed if config.corruptions else None,
        "tolerance": config.tolerance,
        "size": config.size,
        "precision": config.precision,
        "uncertainty": config.uncertainty,
        "members": [each.info["weights_sha256"] for each in members.predictors] if members and config.members else None,
        "fit_temperature": config.fit_temperature or None,
        "temperature": temperature if config.calibrated else None,
    }
    return Inputs(
        Ensemble(predictors, "flips" in config.tta, "scales" in config.tta),
        open_records(folders, keys, config.size, by_shard=config.cache_gb > 0),
        postprocess,
        threshold,
        request,
        runs,
        members,
        temperature,
        _notes(config, runs, [folder.dataset for folder in folders], split),
    )


def _read_subset(config: EvaluateConfig) -> tuple[Split | None, Sequence[str] | None]:
    """Return the split and the keys of the subset; None, None without a split.

    Raises:
        UserError: no such split or subset, or more than one shard folder.
    """
    subset = config.evaluated
    if config.split is None or subset is None:
        if config.subset:
            raise UserError(f"--subset {config.subset}: is a part of a split. Pass --split, too.")
        return None, None
    if subset not in SUBSETS:
        raise UserError(f"--subset {subset}: unknown subset. Choose one of {', '.join(SUBSETS)}.")
    if len(config.shards) > 1:
        raise UserError("--split: belongs to one shard folder, and --shards names several. Evaluate them one by one.")
    split = read_split(locate_split(config.split))
    keys = getattr(split, subset)
    if not keys:
        raise UserError(f"--split {config.split}: has no {subset} images. Choose another --subset.")
    return split, keys


def _read_temperature(config: EvaluateConfig, predictors: Sequence[Predictor]) -> float:
    """Return the temperature that `--calibrated` applies; 1 without it.

    Raises:
        UserError: it does not exist or fit the options, or one can't be fitted on these images.
    """
    option = "--fit-temperature" if config.fit_temperature else "--calibrated"
    if not config.fit_temperature and not config.calibrated:
        return 1.0
    if len(predictors) > 1 or config.tta:
        raise UserError(f"{option}: a temperature belongs to one network. Name one run and leave out --tta.")
    if config.fit_temperature and config.calibrated:
        raise UserError("--calibrated: fit the temperature first, then apply it. Leave out one of the two options.")
    if config.fit_temperature and str(config.runs[0]) in shipped_models():
        raise UserError(
            f"--fit-temperature: {config.runs[0]} is a part of this package, which has its temperature. Export it by "
            f"`mgcc export --model {config.runs[0]} --to safetensors --out DIR`, and fit one for that folder."
        )
    if config.fit_temperature and config.evaluated != "validation":
        raise UserError("--fit-temperature: needs the validation images. Pass --split and leave out --subset.")
    return read_temperature(predictors[0].info) if config.calibrated else 1.0


def _read_postprocess(setting: str) -> Postprocess | None:
    """Return a setting given as words or as the folder of an evaluation; None for `choose`.

    Raises:
        UserError: it is neither, or the folder holds no finished evaluation.
    """
    if setting == "choose":
        return None
    if not Path(setting).is_dir():
        return parse(setting)
    return parse(_read_summary("--postprocess", setting)["postprocess"]["setting"])


def _read_threshold(setting: str) -> float | None:
    """Return a threshold given as number or as the folder of an evaluation; None for `choose`.

    Raises:
        UserError: it is neither, or the folder holds no finished evaluation.
    """
    if setting == "choose":
        return None
    if not Path(setting).is_dir():
        return thresholds.parse(setting)
    chosen = _read_summary("--threshold", setting).get("threshold", {})  # earlier versions had no other than 0.5
    return float(chosen.get("value", thresholds.DEFAULT))


def _read_summary(option: str, folder: str) -> dict[str, Any]:
    path = Path(folder) / SUMMARY
    if not path.is_file():
        raise UserError(f"{option} {folder}: holds no finished evaluation. Run it with {option} choose.")
    return read_versioned(path, FORMAT, VERSION, "Rerun that evaluation into another folder.")


def _notes(
    config: EvaluateConfig, runs: Sequence[dict[str, Any]], datasets: Sequence[str], split: Split | None
) -> list[str]:
    """Say which scores are optimistic, because a network was trained or chosen on the evaluated images."""
    notes = []
    for run, info in zip(config.runs, runs, strict=True):
        if info.get("dataset") not in datasets:
            continue
        if split is None or split.name != info["split"]:
            notes.append(
                f"{run} was trained on images of {info['dataset']} (split {info['split']}), and some of them may be "
                f"evaluated here. Pass --split {info['split']} to evaluate its validation images only."
            )
        elif config.evaluated in ("labeled", "unlabeled"):
            notes.append(f"{run} was trained on the evaluated images ({config.evaluated} of {split.name}).")
        elif config.evaluated == "validation" and config.weights == "best":
            notes.append(f"The best step of {run} was chosen on the evaluated images, so its scores are optimistic.")
    names = {"threshold": "threshold", "postprocess": "post-processing"}
    if chosen := [option for option in names if getattr(config, option) == "choose"]:
        subject = " and the ".join(names[option] for option in chosen)
        options = " ".join(f"--{option} {config.out}" for option in chosen)
        notes.append(
            f"The {subject} {'was' if len(chosen) == 1 else 'were'} chosen on the evaluated images, so scores are "
            f"optimistic. Apply it to other images by {options}."
        )
    return notes
