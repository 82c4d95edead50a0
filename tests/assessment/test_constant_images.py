"""Samples without content are not judged."""

import numpy as np
import pytest
from accelerate import Accelerator

from mgcc_dist.assessment import audit, quality
from mgcc_dist.assessment.config import AuditConfig, QualityConfig
from mgcc_dist.assessment.constant_images import refuse_constant_images
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData


def samples(folder, constant, count=10):
    """A folder of `count` images, the last `constant` of them black."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (count, 16, 16), dtype=np.uint8)
    noise[count - constant :] = 0
    folder.mkdir()
    shard = write_shard(folder / "a.tar", [Sample(f"synthetic-{i}", image, None, {}) for i, image in enumerate(noise)])
    write_index(folder, "synthetic", [shard], request={"seed": 0})
    return folder


def test_black_samples_are_refused_by_quality_and_audit_and_nothing_is_written(phantom_shards, tmp_path):
    keys = phantom_shards.keys()
    images = ImageData(DataConfig(image_size=16), phantom_shards, Split("q", (), tuple(keys[:10]), tuple(keys[10:])))
    folder, accelerator = samples(tmp_path / "samples", constant=10), Accelerator(cpu=True)
    message = "samples: 10 of 10 images are constant, the first is 'synthetic-0'. The model"
    with pytest.raises(UserError, match=message):
        audit.audit(AuditConfig(), None, images, folder, tmp_path / "audit", accelerator)
    with pytest.raises(UserError, match=message):
        quality.evaluate(QualityConfig(neighbours=2), None, images, folder, tmp_path / "quality", accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


@pytest.mark.parametrize(("constant", "refused"), [(0, False), (4, False), (5, True)])
def test_half_of_the_images_must_have_content(tmp_path, caplog, constant, refused):
    shards = ShardFolder.open(samples(tmp_path / "s", constant))
    if refused:
        with pytest.raises(UserError, match="5 of 10 images are constant, the first is 'synthetic-5'"):
            refuse_constant_images(shards, Accelerator(cpu=True))
    else:
        refuse_constant_images(shards, Accelerator(cpu=True))
        assert ("4 of 10 images are constant" in caplog.text) == (constant == 4)
