"""Mean probability of several networks, and of several views of each image (test-time augmentation)."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import resize_image
from mgcc_dist.inference.predictor import NetworkInput, Predictor

FLIPS: list[tuple[int, ...]] = [(), (1,), (0,), (0, 1)]
"""axes [H,W] along which `--tta flips` mirrors the image"""
SCALES = (1.0, 0.75, 1.25)
"""sizes of the network's input under `--tta scales`, relative to the size it was trained at"""
MULTIPLE = 16  # of the sizes under `scales`: a network of five levels halves its input four times


class Ensemble:
    """The mean probability over `predictors` and views.

    Args:
        predictors: their images may differ in size: probabilities are averaged at the image's own size.
        flips: also predict mirrored images.
        scales: also predict images at three quarters and five quarters of the size.
    """

    def __init__(self, predictors: Sequence[Predictor], flips: bool = False, scales: bool = False) -> None:
        self.predictors = predictors
        self.flips = FLIPS if flips else FLIPS[:1]
        self.scales = scales

    def probabilities(
        self,
        images: Sequence[np.ndarray],
        names: Sequence[object],
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Lesion probability, float32 [H,W] in [0,1], of each image uint8 [H,W].

        Args:
            names: of the images, for errors.
            change: is applied to the images as the networks see them, uint8 [B,S,S].

        Raises:
            UserError: a network's output is not finite, or a network does not take the sizes of `scales`.
        """
        totals = [np.zeros(image.shape, np.float32) for image in images]
        views = 0
        for predictor in self.predictors:
            squares = np.stack([predictor.prepare(image).square for image in images])
            squares = change(squares) if change else squares
            for size, axes in itertools.product(self._sizes(predictor), self.flips):
                viewed = [resize_image(np.flip(square, axes), size, size) for square in squares]
                inputs = [NetworkInput(*pair) for pair in zip(images, viewed, strict=True)]
                for total, probability in zip(totals, self._predict(predictor, inputs, names), strict=True):
                    total += np.flip(probability, axes)
                views += 1
        return [total / np.float32(views) for total in totals]

    def _sizes(self, predictor: Predictor) -> list[int]:
        if not self.scales:
            return [predictor.image_size]
        sizes = [round(predictor.image_size * scale / MULTIPLE) * MULTIPLE for scale in SCALES[1:]]
        if predictor.image_size in sizes:
            raise UserError(
                f"--tta scales: the network was trained at {predictor.image_size} pixels, which is too small for other "
                "scales. Leave out scales."
            )
        return [predictor.image_size, *sizes]

    def _predict(
        self, predictor: Predictor, inputs: Sequence[NetworkInput], names: Sequence[object]
    ) -> list[np.ndarray]:
        try:
            return predictor.probabilities(inputs, names)
        except UserError as error:
            if inputs[0].square.shape[0] == predictor.image_size:
                raise
            raise UserError(f"--tta scales: {error} Leave out scales.") from error
