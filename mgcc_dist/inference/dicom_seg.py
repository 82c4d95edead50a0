"""Write masks as DICOM Segmentation that refers to the image it belongs to. Needs highdicom (extra `clinic`).

Most ultrasound has no position in the patient, and viewers want one. So the segmentation gets coordinates of the image
plane: millimetres from the first pixel, frames 1 mm apart, in a frame of reference of its own. Attributes that identify
the patient stay empty unless they are asked for.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import mgcc_dist
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom import REFERENCED, DicomHeader, read_references
from mgcc_dist.data.dicom_regions import Spacing

IDENTIFIERS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName", "SpecificCharacterSet"),
)
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
REFERENCES = (*REFERENCED, "Rows", "Columns", "Modality")


def write_segmentation(
    path: Path,
    masks: np.ndarray,
    image: DicomHeader,
    spacing: Spacing | None,
    weights_sha256: str,
    number: int = 1,
    keep_identifiers: bool = False,
) -> None:
    """Write one segment, the lesion, of an image or a cine.

    Args:
        masks: uint8 [frames,H,W] of 0 and 1; may be memory-mapped.
        weights_sha256: of the network; segmentations by the same one of a series form a series.
        number: of the instance in its series.
        keep_identifiers: copy the patient and the study.

    Raises:
        UserError: the image's header breaks the rules of its kind of object.
    """
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote the header
            _segmentation(masks, image, spacing, weights_sha256, number, keep_identifiers).save_as(path)
    except (UserError, ModuleNotFoundError, OSError):  # OSError: a full disk
        raise
    except Exception as error:  # headers that break the rules of their kind of object
        raise UserError(
            f"{image.path}: DICOM-SEG can't refer to this file ({type(error).__name__}). Choose --masks png or nifti."
        ) from error


def _segmentation(
    masks: np.ndarray,
    image: DicomHeader,
    spacing: Spacing | None,
    weights_sha256: str,
    number: int,
    keep_identifiers: bool,
) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    source = _source(image, spacing, keep_identifiers)
    algorithm = AlgorithmIdentificationSequence(
        "mgcc-dist", codes.cid7162.ArtificialIntelligence, mgcc_dist.__version__
    )
    lesion = SegmentDescription(
        segment_number=1,
        segment_label="Lesion",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    return Segmentation(
        source_images=[source],
        pixel_array=masks,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[lesion],
        series_instance_uid=generate_uid(entropy_srcs=[str(source.SeriesInstanceUID), weights_sha256]),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=number,
        manufacturer="mgcc-dist",
        manufacturer_model_name="mgcc-dist",
        software_versions=mgcc_dist.__version__,
        device_serial_number=weights_sha256[:16],
        content_description="Lesion, for research use only",
    )


def _source(image: DicomHeader, spacing: Spacing | None, keep_identifiers: bool) -> Any:
    """What a segmentation takes from the image's header, with coordinates of the image plane."""
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
    from pydicom import Dataset
    from pydicom.uid import generate_uid

    original = read_references(image.path)
    source = Dataset()
    for name in (*REFERENCES, *LOSSY, *(IDENTIFIERS if keep_identifiers else ())):
        if name in original:
            source[name] = original[name]
    source.Modality = str(original.get("Modality") or "US")
    for name in IDENTIFIERS[:-1]:
        if name not in source:
            setattr(source, name, "")
    source.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(source.SOPInstanceUID), "image plane"])
    x, y = spacing or (1.0, 1.0)
    axes = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    # For images of single-frame objects, and for those of multi-frame objects, also with one frame.
    source.ImagePositionPatient, source.ImageOrientationPatient = [0.0, 0.0, 0.0], axes
    source.PixelSpacing, source.SliceThickness = [y, x], 1.0
    source.NumberOfFrames = image.frames
    shared = Dataset()
    shared.PlaneOrientationSequence = PlaneOrientationSequence("PATIENT", axes)
    shared.PixelMeasuresSequence = PixelMeasuresSequence((y, x), slice_thickness=1.0, spacing_between_slices=1.0)
    source.SharedFunctionalGroupsSequence = [shared]
    source.PerFrameFunctionalGroupsSequence = []
    for index in range(image.frames):
        frame = Dataset()
        frame.PlanePositionSequence = PlanePositionSequence("PATIENT", [0.0, 0.0, float(index)])
        source.PerFrameFunctionalGroupsSequence.append(frame)
    return source
