"""Run by the tests on several ranks: sample from the pipeline argv[1] into the folder argv[2]."""

import sys
from pathlib import Path

from tiny_ldm import SAMPLING

from mgcc_dist.common.distributed import create_accelerator, describe
from mgcc_dist.common.log import configure_logging
from mgcc_dist.diffusion import sampling

configure_logging()
accelerator = create_accelerator()
accelerator.print(describe(accelerator))
sampling.sample(SAMPLING, Path(sys.argv[1]), Path(sys.argv[2]), accelerator)
