"""Segment images or DICOM cines: lesion masks, overlays and a table. For research use only.

    mgcc predict --model busi-small image.png --out out/masks
    mgcc predict --run out/runs/mgcc_1 --images cine.dcm --out out/cine --masks dicom-seg

Works in one process and needs no launcher. Under torchrun, which takes --run for its own --run-path, put `--` before
the options: `torchrun -m mgcc_dist.predict -- --run out/runs/mgcc_1 ...`.

Reads PNG, JPEG, BMP and TIFF of any size, depth and colour, and DICOM (extra `clinic`) of one or many frames, of which
it segments the two-dimensional ultrasound regions. Writes under the images' names, in the same subfolders; NAME of a
DICOM file is its SOP Instance UID, and of each frame of a cine NAME/0001, NAME/0002, ...:

    OUT/masks/NAME.png       0 and 255, at the image's size (after the camera's EXIF rotation); or NAME.nii.gz, NAME.dcm
    OUT/overlays/NAME.png    the image in grey, with the contour of the mask
    OUT/predictions.csv      file, mask, size, area, confidence, lesion (yes or no), diameters; in mm where known
                             with --uncertainty also score and review
    OUT/skipped.csv          file, problem; only with --skip-bad, if any file could not be read
    OUT/predict.json         the images, weights and options
    OUT/images.jsonl         sha256 of each image
    OUT/written.jsonl        sha256 of each of these files

The network's probability is resized bilinearly to the image's size and thresholded at 0.5. `confidence` is the mean
probability inside the mask, or for an empty mask 1 - the highest probability of the image. It is for sorting and not
calibrated without --calibrated. --uncertainty adds a score from 0 to 1, how well the predictions of its decoders, of
mirrored views or of several runs agree; --reject-below marks images of a lower score for review by a person.
Convolutions run in bfloat16 where the device supports it, which moves single pixels of a contour; `--precision no`
keeps float32. predictions.csv is written last: a folder without it is incomplete, and the same command completes it. If
all images are in it, and none was changed, there is nothing to do. A file in OUT that was changed since, such as a mask
corrected by hand, is never replaced or deleted: it is kept and named. `--overwrite` predicts all images again, and
refuses if any file in OUT was changed.
"""

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.inference.config import PredictConfig


def run(config: PredictConfig) -> None:
    """Segment images."""
    from mgcc_dist.inference.folder import predict_folder

    predict_folder(config)


PROGRAM = Program("predict", __doc__, Command(PredictConfig, run, "segment images and DICOM cines", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("predict", main)
