import pytest

from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import read_split
from mgcc_dist.shards import main


@pytest.fixture(scope="module")
def busbra_root(data_root):
    """The 725 images of BUS-BRA in the development data."""
    root = data_root / "BUSBRA"
    if not root.is_dir():
        pytest.skip(f"needs BUS-BRA in {root}; set MGCC_DATA to its parent folder")
    return root


@pytest.fixture(scope="module")
def busbra_shards(busbra_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("busbra") / "shards"
    main(["busbra", "--root", str(busbra_root), "--out", str(out), "--size", "16"])
    return ShardFolder.open(out)


def test_real_busbra_has_the_published_classes_and_patients(busbra_shards):
    assert len(busbra_shards) == busbra_shards.index["labeled"] == 725
    assert busbra_shards.index["classes"] == {"benign": 507, "malignant": 218}
    assert len({record.group for record in busbra_shards.records}) == 411


def test_real_busbra_image_is_read_at_its_size_with_a_plausible_mask(busbra_root):
    reader = READERS.get("busbra").load()(busbra_root)
    assert reader.bad_files == reader.notes == []
    sample = reader[[item.key for item in reader.items].index("bus_0005-l")]
    assert sample.image.shape == sample.mask.shape == (371, 275)
    assert 0 < (sample.mask > 0).mean() < 0.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_grouped_split_of_real_busbra_keeps_patients_together(busbra_shards, tmp_path, seed):
    out = tmp_path / "split.json"
    main(["split", "--root", str(busbra_shards.folder), "--out", str(out), "--seed", str(seed), "--grouped"])
    split = read_split(out)
    # The published file name contains the patient's number.
    train = {key.split("-")[0] for key in split.train}
    assert train.isdisjoint(key.split("-")[0] for key in split.validation)
    assert len(split.validation) == round(0.3 * 725)
    assert len(split.train) + len(split.validation) == 725
