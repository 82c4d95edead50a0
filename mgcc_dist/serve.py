"""Open a page on this machine that segments images and lets a person correct the masks. For research use only.

    mgcc serve --model busi-small --out out/corrections
    mgcc serve --run out/runs/mgcc_1 --images DIR --order uncertainty --out out/corrections

Drop an image or DICOM file on the page, or go through those of --images. It shows the mask, where the network is
uncertain, and area and diameters in mm (in pixels where the spacing is unknown). Correct the mask with the brush, by
mouse or keyboard, and save it:

    OUT/images/NAME.png      the image in 8-bit grey; for DICOM one per two-dimensional region
    OUT/masks/NAME.png       the mask, 0 and 255
    OUT/corrections.jsonl    what each was made from

`mgcc shards folder --root OUT --out SHARDS` converts them for training. NAME is the image's name, for DICOM its SOP
Instance UID. After a restart with the same --out, corrected images are skipped.

The page is served to this machine only (127.0.0.1), and only with the token in its address. Images are not sent
anywhere else, and the page loads nothing from elsewhere. From another machine use a tunnel:
`ssh -L PORT:localhost:PORT HOST`. Ctrl-C stops the server. Needs the extra `serve`.
"""

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.serving.config import ServeConfig


def run(config: ServeConfig) -> None:
    """Serve the page until Ctrl-C."""
    from mgcc_dist.serving.server import serve

    serve(config)


PROGRAM = Program("serve", __doc__, Command(ServeConfig, run, "correct masks in the browser", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("serve", main)
