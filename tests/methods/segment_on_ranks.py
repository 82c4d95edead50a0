"""Program that each rank runs: `segment` for several methods, one after the other in one process group.

A method that is refused is printed by rank 0, and the next one runs.

segment_on_ranks.py SHARDS SPLIT OUT METHOD:NETWORK ...
"""

import os
import sys

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.log import configure_logging
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.segment import run

TINY = """
--data.synthetic null --data.image_size 16 --data.workers 0 --loop.epochs null
--loop.steps 2 --loop.learning_rate 0.02 --loop.log_every 1
"""
SWIN = "{name: swin_unet, embed_dim: 4, depths: [2, 2], heads: [1, 2], window: 2}"
NETWORKS = {"mgcc": "{name: mgcc, widths: [4, 8], taps: [1, 2, 3]}", "swin_unet": SWIN}
METHODS = {"mean_teacher": "{name: mean_teacher, teacher_start: 0}", "ctbct": f"{{name: ctbct, swin_unet: {SWIN}}}"}

configure_logging()
shards, split, out, *pairs = sys.argv[1:]
for pair in pairs:
    method, network = pair.split(":")
    # DeepSpeed's settings live as long as the process, and with them the batch: four images for all.
    batches = (4, 0) if method == "supervised" else (2, 2)
    words = f"--preset mgcc_demo {TINY} --data.shards {shards} --data.split {split} --out {out}/{method}-{network}"
    words += " --data.batch_labeled {} --data.batch_unlabeled {}".format(*batches)
    components = ["--method", METHODS.get(method, method)]
    components += ["--network", NETWORKS.get(network, f"{{name: {network}, widths: [4, 8]}}")]
    try:
        run(parse(SegmentConfig, [*words.split(), *components], CONFIGS / "segment", "mgcc_demo"))
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"{pair} refused: {error}", flush=True)
