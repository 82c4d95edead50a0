"""Settings of the audit that are checked before training."""

import pytest

from mgcc_dist.assessment import audit
from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData


def images_of(folder, phantom_shards, groups):
    samples = [Sample(f"k{i}", phantom_shards[i].image, None, {"group": group}) for i, group in enumerate(groups)]
    write_index(folder, "toy", [write_shard(folder / "a.tar", samples)])
    shards = ShardFolder.open(folder)
    return ImageData(DataConfig(image_size=32), shards, Split("s", (), ("k0", "k1"), ("k2",)))


def test_images_of_one_group_are_refused_before_training(tmp_path, phantom_shards):
    images = images_of(tmp_path, phantom_shards, "aaa")
    with pytest.raises(UserError, match=r"audit: all images belong to one group.* Pass --audit\.enabled false"):
        audit.check_config(AuditConfig(), images)
    audit.check_config(AuditConfig(enabled=False), images)


def test_two_groups_are_enough(tmp_path, phantom_shards):
    audit.check_config(AuditConfig(), images_of(tmp_path, phantom_shards, "aab"))
