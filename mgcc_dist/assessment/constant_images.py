"""Refuse to judge samples that are no images."""

import logging

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from mgcc_dist.common.errors import SharedError
from mgcc_dist.data.records import ShardFolder

logger = logging.getLogger(__name__)


def refuse_constant_images(shards: ShardFolder, accelerator: Accelerator) -> None:
    """Check that fewer than half of the images have one grey value everywhere. Collective.

    Raises:
        SharedError: at least half of them have.
    """
    mine = range(accelerator.process_index, len(shards), accelerator.num_processes)
    constant = sorted(gather_object([shards.records[i].key for i in mine if np.ptp(shards[i].image) == 0]))
    if not constant:
        return
    found = f"{shards.folder}: {len(constant)} of {len(shards)} images are constant, the first is {constant[0]!r}"
    if 2 * len(constant) >= len(shards):
        raise SharedError(
            f"{found}. The model that sampled them is broken or hardly trained. "
            "Check metrics.jsonl of both networks, train longer, or sample with --sampling.precision no."
        )
    logger.warning("%s", found)
