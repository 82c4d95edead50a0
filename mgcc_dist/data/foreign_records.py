"""Decode records of WebDataset shards that another program wrote, as their index.json describes them.

An index of such shards has, for each record, the names and sha256 of its image and mask in the tar, and under `read`
the bits of 16-bit images and the label values of masks. Nothing is unpacked: members are read at their byte ranges.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgcc_dist.data.images import BadFile, read_grey
from mgcc_dist.data.masks import read_mask
from mgcc_dist.data.sample import RecordInfo, Sample
from mgcc_dist.data.storage import CorruptRecord, OpenShard


def decode_foreign(shard: OpenShard, info: RecordInfo, dataset: str, how: Mapping[str, Any]) -> Sample:
    """Decode one record.

    Args:
        how: `read` of index.json.

    Raises:
        CorruptRecord: a file is missing or has another content.
    """
    contents = [(Path(name), shard.read_verified(name, sha256)) for name, sha256 in info.files]
    try:
        image = read_grey(contents[0][0], how.get("bits"), contents[0][1])
        mask = read_mask(contents[1][0], how.get("label_values", ()), contents[1][1])[0] if info.labeled else None
    except BadFile as bad:
        raise CorruptRecord(str(bad)) from bad
    height, width = image.shape
    meta = {"dataset": dataset, "class": info.category, "group": info.group, "original_size": [width, height]}
    return Sample(info.key, image, mask, meta)
