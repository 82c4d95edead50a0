"""Segment images and cines: the work of `mgcc predict`."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.common.words import counted
from mgcc_dist.data.dicom_regions import PLAUSIBLE, Spacing, is_plausible
from mgcc_dist.data.images import bits_used
from mgcc_dist.data.workers import load_in_order
from mgcc_dist.evaluation.temperature import read_temperature
from mgcc_dist.inference.backends import open_backend
from mgcc_dist.inference.config import PredictConfig
from mgcc_dist.inference.output_folder import PREDICTIONS, SKIPPED, OutputFolder, list_names
from mgcc_dist.inference.predictor import Predictor, load
from mgcc_dist.inference.reading import BadFrame, Frame, FrameReader
from mgcc_dist.inference.results import OutputOptions, SourceWriter, files_of, table
from mgcc_dist.inference.sources import STDIN, Source, describe_inputs, list_sources, read_inputs
from mgcc_dist.inference.uncertainty import Members, open_members

logger = logging.getLogger("mgcc_dist.predict")

Row = dict[str, Any]
PACKAGES = {"nifti": "nibabel", "dicom-seg": "highdicom"}


def predict_folder(config: PredictConfig) -> None:
    """Segment images, unless that is done already. Files in `out` that somebody else changed are kept.

    Raises:
        UserError: `run` holds no trained network, `images` no image or an unreadable one, or `out` other files.
    """
    spacing = spacing_option(config.spacing)
    for kind, package in PACKAGES.items():
        if kind in config.masks:
            import_module(package)  # missing ones are named before anything is predicted
    paths = read_inputs(config.images)
    predictor = load(config.run, config.weights, precision=config.precision, kernels=config.kernels)
    temperature = read_temperature(predictor.info) if config.calibrated else 1.0
    sources = list_sources(paths, config.out, config.keep_identifiers, from_list=config.images == (STDIN,))
    options = OutputOptions(
        config.masks,
        config.contours,
        config.probabilities,
        config.keep_identifiers,
        config.uncertainty_maps,
        config.reject_below,
        temperature,
    )
    if "dicom-seg" in config.masks and not any(source.dicom for source in sources):
        raise UserError(
            "--masks dicom-seg: refers to the DICOM file of an image, and none is DICOM. Choose png or nifti."
        )
    if "dicom-seg" in config.masks:
        sources = [_refuse_without_uids(source) for source in sources]
    predictor, int8 = open_backend(config, predictor, sum(source.frames for source in sources))
    members = _open_members(config, predictor)
    contents = _contents(config, predictor, members, temperature, paths, sources) | ({"int8": int8} if int8 else {})
    out = OutputFolder(config.out, contents)
    out.open(config.overwrite)
    hashes = {source.file: source.sha256() for source in sources}
    if out.is_finished(hashes) and _listed(config.out) == hashes.keys():
        logger.info("predict: %s already exists; nothing to do", config.out / PREDICTIONS)
        return
    out.reopen(name for source in sources for name in options.names(source))

    bits = bits_used(source.path for source in sources if not source.dicom and not source.problem)
    if bits:
        logger.info("predict: 16-bit images are scaled to 8 bits as images of %d bits", bits)
    frames = ((index, frame) for index, source in enumerate(sources) for frame in range(source.frames))
    chunks = list(iter(lambda: tuple(islice(frames, config.batch)), ()))
    reader = FrameReader(sources, chunks, predictor.image_size, predictor.fit, bits, spacing, config.skip_bad)
    rows: list[Row] = []
    skipped: list[Row] = []
    predicted = _predict(reader, predictor, members, config.workers, skipped)
    for index, group in groupby(predicted, key=lambda each: each[0].source):
        first = next(group)
        weights = predictor.info["weights_sha256"]
        with SourceWriter(out, sources[index], index + 1, first[0], options, weights) as writer:
            for frame, squares, of_members in chain([first], group):
                rows += writer.write(frame, squares, predictor.fit, of_members)
    if not rows:
        raise UserError(
            f"--images {' '.join(config.images)}: of {counted(len(sources), 'image')} none can be read. "
            f"The first error is {skipped[0]['file']}: {skipped[0]['problem']}"
        )

    out.sync()
    if skipped:
        out.write(SKIPPED, table(skipped))
        logger.warning("predict: skipped %s, see %s", counted(len(skipped), "file"), config.out / SKIPPED)
    out.write(PREDICTIONS, table(rows))
    out.finish(hashes)
    if out.kept:
        logger.warning(
            "predict: kept %s changed since, or not written by `mgcc predict`: %s. "
            "predictions.csv describes the network's masks.",
            *(counted(len(out.kept), "file"), list_names(out.kept)),
        )
    lesions = {(row["file"], row["frame"]) for row in rows if row["lesion"] == "yes"}
    images = {(row["file"], row["frame"]) for row in rows}
    found = counted(len(images), "image")
    logger.info("predict: %s, %d with a lesion -> %s", found, len(lesions), config.out / PREDICTIONS)
    if config.reject_below is not None:
        review = {(row["file"], row["frame"]) for row in rows if row["review"] == "yes"}
        logger.info("predict: for review by a person (column review): %d of %s", len(review), found)


def _predict(
    reader: FrameReader, predictor: Predictor, members: Members | None, workers: int, skipped: list[Row]
) -> Iterator[tuple[Frame, list[Tensor], list[Tensor]]]:
    """Yield each frame with the probability [S,S] of its regions, and those of the members [M,S,S], if there are any.

    Frames that can't be read are added to `skipped`.
    """
    with ProgressBar(sum(map(len, reader.chunks)), "predict", "images") as bar:
        for read in load_in_order(reader, range(len(reader.chunks)), min(workers, len(reader.chunks))):
            frames = [frame for frame in read if isinstance(frame, Frame)]
            names = [_name(reader.sources[frame.source], frame.index) for frame in frames for _ in frame.regions]
            inputs = [square for frame in frames for square in frame.squares]
            squares = iter(predictor.squares(inputs, names))
            of_members = iter(members.squares(inputs, names) if members else ())
            for frame in frames:
                count = len(frame.regions)
                yield frame, list(islice(squares, count)), list(islice(of_members, count))
            for bad in (frame for frame in read if isinstance(frame, BadFrame)):
                skipped.append({"file": reader.sources[bad.source].file, "problem": bad.problem})
            bar.update(len(read))


def _name(source: Source, frame: int) -> str:
    return repr(source.file) + (f" frame {frame + 1}" if source.frames > 1 else "")


def _refuse_without_uids(source: Source) -> Source:
    """Make a DICOM image that a segmentation can't refer to an unreadable one."""
    if not source.dicom or not source.dicom.missing_uid:
        return source
    problem = f"has no {source.dicom.missing_uid}, which --masks dicom-seg refers to. Choose --masks png or nifti."
    return replace(source, dicom=None, problem=problem)


def spacing_option(values: Sequence[float]) -> Spacing | None:
    """mm per pixel along x and y, as `--spacing` gives them.

    Raises:
        UserError: more than two numbers, or ones that no pixel measures.
    """
    if len(values) > 2:
        raise UserError(f"--spacing: got {len(values)} numbers. Give one, or one for x and one for y.")
    if not is_plausible(values):
        limits = "from {:g} to {:g}".format(*PLAUSIBLE)
        raise UserError(f"--spacing {' '.join(map(str, values))}: is not {limits} mm per pixel")
    return (values[0], values[-1]) if values else None


def _open_members(config: PredictConfig, predictor: Predictor) -> Members | None:
    """Load the members of `--uncertainty`.

    Raises:
        UserError: they do not exist or fit the run, or an option needs --uncertainty.
    """
    for option, value in {"reject-below": config.reject_below, "uncertainty-maps": config.uncertainty_maps}.items():
        if value not in (None, False) and config.uncertainty is None:
            raise UserError(f"--{option}: needs a score. Pass --uncertainty decoders, tta or ensemble, too.")
    return open_members(config.uncertainty, [predictor], config.members, config.weights)


def _contents(
    config: PredictConfig,
    predictor: Predictor,
    members: Members | None,
    temperature: float,
    paths: list[Path],
    sources: list[Source],
) -> dict[str, Any]:
    """What makes two predictions the same: predict.json. Options that write more are named if they are set."""
    private = any(source.private for source in sources)
    chosen = {
        "masks": sorted(config.masks) if config.masks != ("png",) else None,
        "contours": config.contours,
        "probabilities": config.probabilities,
        "spacing": list(config.spacing),
        "keep_identifiers": config.keep_identifiers,
        "uncertainty": config.uncertainty,
        "members": [each.info["weights_sha256"] for each in members.predictors] if members and config.members else [],
        "uncertainty_maps": config.uncertainty_maps,
        "reject_below": config.reject_below,
        "temperature": temperature if config.calibrated else None,
    }
    return {
        "images": describe_inputs(paths, private),
        "weights": str(Path(predictor.info["weights"]).resolve()),
        "weights_sha256": predictor.info["weights_sha256"],
    } | {name: value for name, value in chosen.items() if value is not None and value is not False and value != []}


def _listed(out: Path) -> set[str]:
    """The image files that the tables of an earlier prediction list."""
    tables = [path for name in (PREDICTIONS, SKIPPED) if (path := out / name).is_file()]
    return {file for path in tables for file in files_of(path.read_bytes())}
