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
--data.synthetic null --data.image_size 16 --data.workers 0 --network.widths [4,8]
--network.taps [1,2,3] --network.embed_dim 4 --network.depths [2,2] --network.heads [1,2] --network.window 2
--method.teacher_start 0 --loop.epochs null --loop.steps 2 --loop.learning_rate 0.02 --loop.log_every 1
"""

configure_logging()
shards, split, out, *pairs = sys.argv[1:]
for pair in pairs:
    method, network = pair.split(":")
    # DeepSpeed's settings live as long as the process, and with them the batch: four images for all.
    batches = (4, 0) if method == "supervised" else (2, 2)
    words = f"--preset mgcc_demo {TINY} --data.shards {shards} --data.split {split}"
    words += " --data.batch_labeled {} --data.batch_unlabeled {}".format(*batches)
    words += f" --method.name {method} --network.name {network} --out {out}/{method}-{network}"
    try:
        run(parse(SegmentConfig, words.split(), CONFIGS / "segment", "mgcc_demo"))
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"{pair} refused: {error}", flush=True)
