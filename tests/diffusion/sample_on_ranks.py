"""Run by the tests on several ranks: sample from the pipeline argv[1] into the folder argv[2].

argv[3], if it is given, is another number of images, of which each rank stops for ever before it encodes its second.
"""

import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

from tiny_ldm import SAMPLING

from mgcc_dist.common.distributed import create_accelerator, describe
from mgcc_dist.common.log import configure_logging
from mgcc_dist.data import records
from mgcc_dist.diffusion import sampling

configure_logging()
accelerator = create_accelerator()
accelerator.print(describe(accelerator))
config, encode, encoded = SAMPLING, records._encode, count()


def encode_one(sample):
    if next(encoded):
        time.sleep(600)
    return encode(sample)


if len(sys.argv) > 3:
    config = replace(SAMPLING, count=int(sys.argv[3]))
    records._encode = encode_one
sampling.sample(config, Path(sys.argv[1]), Path(sys.argv[2]), accelerator)
