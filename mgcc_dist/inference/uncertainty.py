"""Uncertainty of a segmentation: how much the members of a group of networks, or of views, disagree.

Members are the main and auxiliary decoders of one network (MGCC, CCT), several runs, or mirrored views of the image.
They change neither the mask nor the probability that is reported: they say how far to trust it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import read_versioned, sha256_of
from mgcc_dist.inference.ensemble import FLIPS
from mgcc_dist.inference.loading import FORMAT, VERSION, build_method, read_header, verify_hash
from mgcc_dist.inference.predictor import Predictor, load
from mgcc_dist.methods.mgcc import MultiLevelCrossConsistency
from mgcc_dist.train.initial_weights import AUXILIARY, MODEL, WEIGHTS
from mgcc_dist.train.saved_run import newest_checkpoint

UncertaintyKind = Literal["decoders", "tta", "ensemble"]
OTHERS = "Choose tta or ensemble."


def disagreement(members: Tensor) -> Tensor:
    """Return the mutual information between each pixel's label and the member, in bits, float [...] in [0,1].

    H(mean of p) - mean of H(p), where H is the binary entropy: 0 where all members say the same, 1 where half of them
    are sure of a lesion and half of background.

    Shapes: `members` float [M,...], probabilities.

    Source: Houlsby et al. 2011 (BALD); Smith and Gal 2018.
    """
    return (_entropy(members.mean(dim=0)) - _entropy(members).mean(dim=0)).clamp(0, 1)


def agreement(members: Tensor) -> float:
    """Return the mean soft Dice of all pairs of members, 2 sum(p q) / (sum(p) + sum(q)), in [0,1].

    Of sure members it is the Dice of their masks. It is lower where members disagree or are unsure, and near 0 where
    none of them finds a lesion: the Dice of two empty masks would be 1, although a network that misses a lesion misses
    it in every view. Of members that are 0 everywhere it is 0.

    Shapes: `members` float [M,H,W], probabilities; M is at least 2.

    Source: Roy et al. 2019, Bayesian QuickNAT ("Dice agreement in MC samples"), of probabilities instead of masks.
    """
    pixels = members.flatten(1).double()
    first, second = torch.triu_indices(len(pixels), len(pixels), offset=1)
    common, areas = pixels @ pixels.T, pixels.sum(dim=1)
    total = areas[first] + areas[second]
    return float(torch.where(total > 0, 2 * common[first, second] / total, 0.0).mean())


@dataclass(frozen=True)
class Members:
    """Networks, each on the image as it is or, with `flips`, on its four mirrored views."""

    predictors: Sequence[Predictor]
    flips: bool = False

    def __post_init__(self) -> None:
        inputs = {(predictor.image_size, predictor.fit) for predictor in self.predictors}
        if len(inputs) > 1:
            described = " and ".join(f"{size} pixels, {fit}" for size, fit in sorted(inputs))
            raise UserError(
                f"--uncertainty ensemble: the runs see images in different ways ({described}). "
                "Choose runs of the same data.image_size and data.fit."
            )

    def squares(self, squares: Sequence[np.ndarray], names: Sequence[object] | None = None) -> list[Tensor]:
        """Return the members' probabilities [M,S,S] on the CPU of each square uint8 [S,S].

        Raises:
            UserError: a network's output is not finite.
        """
        outputs = []
        for predictor, axes in itertools.product(self.predictors, FLIPS if self.flips else FLIPS[:1]):
            viewed = predictor.squares([np.flip(square, axes) for square in squares], names)
            outputs.append([output.flip(axes).cpu() for output in viewed])
        return [torch.stack(members) for members in zip(*outputs, strict=True)]

    def scores(self, images: Sequence[np.ndarray], names: Sequence[object] | None = None) -> list[float]:
        """Return the `agreement` on each image uint8 [H,W]."""
        squares = [self.predictors[0].prepare(image).square for image in images]
        return [agreement(members) for members in self.squares(squares, names)]


def open_members(
    kind: UncertaintyKind | None,
    predictors: Sequence[Predictor],
    others: Sequence[Path],
    weights: Literal["best", "last"],
) -> Members | None:
    """Return the members that `--uncertainty` names; None without it.

    Args:
        predictors: the runs that are predicted or evaluated.
        others: the runs of `--members`.

    Raises:
        UserError: the options do not fit each other or the runs.
    """
    if others and kind != "ensemble":
        raise UserError("--members: are the runs of an ensemble. Pass --uncertainty ensemble, too.")
    if kind is None:
        return None
    first = predictors[0]
    if kind == "tta":
        return Members(predictors, flips=True)
    if kind == "decoders":
        if len(predictors) > 1:
            raise UserError("--uncertainty decoders: are those of one network. Name one run, or choose ensemble.")
        return Members(load_decoders(first))
    precision = first.precision
    members = [*predictors, *(load(run, weights, first.device, precision) for run in others)]
    hashes = {predictor.info["weights_sha256"] for predictor in members}
    if len(hashes) < max(2, len(members)):
        raise UserError("--uncertainty ensemble: needs two or more runs of different weights. Name more by --members.")
    return Members(members)


def load_decoders(predictor: Predictor) -> list[Predictor]:
    """Return a predictor of each decoder of the network that `predictor` has, the main decoder first.

    Raises:
        UserError: as `load_with_auxiliary`.
    """
    method = load_with_auxiliary(Path(predictor.info["weights"]), "--uncertainty decoders", OTHERS)
    precision = predictor.precision
    return [
        Predictor(module.eval(), predictor.image_size, predictor.info, predictor.device, precision, predictor.fit)
        for module in method.network.decoders()
    ]


def load_with_auxiliary(weights: Path, option: str, remedy: str) -> MultiLevelCrossConsistency:
    """Load a weights file and the auxiliary decoders that were trained with it, which weights files do not hold.

    They are next to the weights in a model folder that was exported with them, else in the newest checkpoint of the
    run.

    Args:
        option: what needs them, for errors.
        remedy: what else to do, for errors.

    Raises:
        UserError: the network has no auxiliary decoders, or they are absent, damaged or of other weights.
    """
    method = build_method(weights)
    if not isinstance(method, MultiLevelCrossConsistency):
        name = read_header(weights)["method"]["name"]
        raise UserError(f"{option}: {weights} was trained by {name}, which has no auxiliary decoders. {remedy}")
    if (path := weights.with_name(AUXILIARY)).is_file():
        model = read_versioned(weights.with_name(MODEL), FORMAT, VERSION, remedy)
        verify_hash(path, sha256_of(path), model)
        method.predictor().load_state_dict(load_file(weights))
        _load(method, path, option, remedy, partial=True)
        return method
    if weights.with_name(MODEL).is_file():
        raise UserError(f"{option}: {weights.parent} was exported without its auxiliary decoders. {remedy}")
    checkpoint = newest_checkpoint(weights.parent.parent)
    path = checkpoint / WEIGHTS if checkpoint else weights.parent.parent / "checkpoints"
    if not path.is_file():
        raise UserError(f"{option}: {path} does not exist, and it has the auxiliary decoders. {remedy}")
    _load(method, path, option, remedy)
    used = load_file(weights)
    if any(not torch.equal(tensor, used[name]) for name, tensor in method.predictor().state_dict().items()):
        if weights.parent.name == "best":
            raise UserError(
                f"{option}: a run keeps its auxiliary decoders only in its newest checkpoint ({path}), which is of "
                f"another step than {weights}. Pass --weights last, or: {remedy}"
            )
        raise UserError(
            f"{option}: {path}, which has the auxiliary decoders, has other weights than {weights}: the run averaged "
            f"them. {remedy}"
        )
    return method


def auxiliary_weights(method: MultiLevelCrossConsistency) -> dict[str, Tensor]:
    """Return the part of the state dict that the inference network does not have."""
    shared = {tensor.data_ptr() for tensor in method.predictor().state_dict().values()}
    return {name: tensor for name, tensor in method.state_dict().items() if tensor.data_ptr() not in shared}


def _load(method: MultiLevelCrossConsistency, path: Path, option: str, remedy: str, partial: bool = False) -> None:
    """Load a file into `method`; with `partial` it has only the `auxiliary_weights`.

    Raises:
        UserError: it is damaged, or of another network.
    """
    try:
        state = load_file(path)
        if partial:
            state = method.state_dict() | {name: state[name] for name in auxiliary_weights(method)}
        method.load_state_dict(state)
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{option}: {path} can't be loaded ({reason_of(error)}). {remedy}") from error


def _entropy(probability: Tensor) -> Tensor:
    """bits"""
    nats = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return nats / np.log(2)
