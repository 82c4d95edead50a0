import dataclasses
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample, is_key


def sample(i: int, labeled: bool = True, key: str | None = None) -> Sample:
    rng = np.random.default_rng(i)
    image = rng.integers(0, 256, (20 + i, 30), dtype=np.uint8)
    mask = np.where(image > 128, 255, 0).astype(np.uint8) if labeled else None
    meta = {"dataset": "toy", "class": "benign" if i % 2 else "malignant", "original_size": [30, 20 + i]}
    return Sample(f"benign ({i})" if key is None else key, image, mask, {**meta, "group": f"patient {i // 2}"})


@pytest.fixture
def folder(tmp_path):
    """Two shards of three records; the last record is unlabeled."""
    shards = [
        write_shard(tmp_path / "toy-000000.tar", [sample(i) for i in range(3)]),
        write_shard(tmp_path / "toy-000001.tar", [sample(3), sample(4), sample(5, labeled=False)]),
    ]
    write_index(tmp_path, "toy", shards, made={"by": "a test"})
    return tmp_path


def assert_same(read: Sample, written: Sample) -> None:
    assert read.key == written.key
    np.testing.assert_array_equal(read.image, written.image)
    assert read.image.dtype == np.uint8
    assert (read.mask is None) == (written.mask is None)
    if written.mask is not None:
        np.testing.assert_array_equal(read.mask, written.mask)
    assert written.meta.items() <= read.meta.items()


def test_records_are_read_back_in_any_order(folder):
    shards = ShardFolder.open(folder)
    assert len(shards) == 6
    for i in (5, 0, 3, 0):
        assert_same(shards[i], sample(i, labeled=i != 5))
    assert shards.keys() == [f"benign ({i})" for i in range(6)]
    assert shards.index_of("benign (4)") == 4
    assert [record.labeled for record in shards.records] == [True] * 5 + [False]
    assert shards.records[3].group == "patient 1"
    assert shards.records[3].category == "benign"
    assert shards.records[3].shard == "toy-000001.tar"


def test_index_counts_records_by_class_and_label(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["format"] == "mgcc-dist shards"
    assert (index["records"], index["labeled"]) == (6, 5)
    assert index["classes"] == {"benign": 3, "malignant": 3}
    assert index["made"] == {"by": "a test"}


def test_webdataset_reads_the_same_records(folder):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    plain = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    ours = ShardFolder.open(folder)
    assert [record["__key__"] for record in plain] == ours.keys()
    for i, record in enumerate(plain):
        read = ours[i]
        np.testing.assert_array_equal(record["png"], read.image)
        assert ("mask.png" in record) == (read.mask is not None)
        if read.mask is not None:
            np.testing.assert_array_equal(record["mask.png"], read.mask)
        assert record["json"] == read.meta


def test_shards_are_byte_reproducible(tmp_path):
    first = write_shard(tmp_path / "a" / "x.tar", [sample(i) for i in range(3)])
    again = write_shard(tmp_path / "b" / "x.tar", [sample(i) for i in range(3)])
    assert first == again
    assert (tmp_path / "a" / "x.tar").read_bytes() == (tmp_path / "b" / "x.tar").read_bytes()


def test_rewriting_samples_gives_the_same_shard(folder, tmp_path):
    shards = ShardFolder.open(folder)
    entry = write_shard(tmp_path / "again" / "toy-000000.tar", [shards[i] for i in range(3)])
    assert entry == shards.index["shards"][0]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.text(min_size=1, max_size=150))
def test_any_key_round_trips_or_is_rejected(tmp_path_factory, key):
    folder = tmp_path_factory.mktemp("key")
    try:
        shard = write_shard(folder / "x.tar", [sample(1, key=key)])
    except UserError:
        assert not is_key(key)
        return
    write_index(folder, "toy", [shard])
    assert_same(ShardFolder.open(folder)[0], sample(1, key=key))
    (plain,) = webdataset.WebDataset(str(folder / "x.tar"), shardshuffle=False)
    assert plain["__key__"] == key


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\nb"])
def test_invalid_keys_are_rejected(tmp_path, key):
    with pytest.raises(UserError, match="not a valid key"):
        write_shard(tmp_path / "x.tar", [sample(1, key=key)])
    assert list(tmp_path.iterdir()) == []


def test_duplicate_keys_are_rejected(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", [sample(1)]) for i in range(2)]
    with pytest.raises(UserError, match=r"benign \(1\)"):
        write_index(tmp_path, "toy", shards)


def test_folder_without_index_is_incomplete(folder):
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        ShardFolder.open(folder)


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        ShardFolder.open(tmp_path / "nowhere")


def test_missing_shard_is_reported(folder):
    (folder / "toy-000001.tar").unlink()
    with pytest.raises(UserError, match=r"toy-000001\.tar: missing"):
        ShardFolder.open(folder)


def test_truncated_shard_is_detected_without_hashing(folder):
    path = folder / "toy-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"toy-000001\.tar: has \d+ bytes, expected \d+"):
        ShardFolder.open(folder, verify=False)


def test_flipped_bit_is_detected_when_verifying(folder):
    flip(folder / "toy-000001.tar", "benign (4).png")
    with pytest.raises(UserError, match=r"toy-000001\.tar: its sha256 does not match"):
        ShardFolder.open(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "not a mgcc-dist shards file"),
        ('{"format": "mgcc-dist shards", "version": 9}', "version 9, not 1"),
    ],
)
def test_damaged_index_is_rejected(folder, content, expected):
    (folder / "index.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        ShardFolder.open(folder)


def test_index_without_a_field_is_rejected(folder):
    index = json.loads((folder / "index.json").read_text())
    del index["shards"][0]["records"][0]["group"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="damaged"):
        ShardFolder.open(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.update(shards=None), "NoneType"),
        (lambda index: index.update(shards={}), "records does not match"),
        (lambda index: index.update(dataset=7), "7 is not a text"),
        (lambda index: index["shards"][0].update(records={}), "records does not match"),
        (lambda index: index["shards"][0]["records"].pop(), "records does not match"),
        (lambda index: index["shards"][0]["records"].append(index["shards"][0]["records"][0]), "two records have"),
        (lambda index: index["shards"][0]["records"][0].update(labeled=False), "labeled does not match"),
        (lambda index: index["shards"][0]["records"][0].update(labeled="no"), "is not true or false"),
        (lambda index: index["shards"][0]["records"][0].update({"class": "other"}), "classes does not match"),
        (lambda index: index["shards"][0]["records"][0].update({"class": None}), "None is not a text"),
        (lambda index: index["shards"][0]["records"][0].update(key=5), "5 is not a text"),
        (lambda index: index["shards"][0]["records"][0].update(group=["a"]), "is not a text"),
    ],
)
def test_edited_index_is_rejected_before_it_is_used(folder, change, problem):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=rf"index\.json: damaged \(.*{problem}.*\)\. Restore it, or move the folder elsewhere"
    ):
        ShardFolder.open(folder, verify=False)


@pytest.mark.parametrize("name", ["/tmp/a.tar", "../a.tar", "sub/a.tar", "..", "", "a\\b.tar", "a\0.tar", 7, None])
def test_index_that_names_a_file_outside_the_folder_is_rejected(folder, name):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as raised:
        ShardFolder.open(folder)
    line = f"{folder}/index.json: {name!r} is not a plain file name, so it could be outside the folder. Restore it"
    assert str(raised.value).startswith(line)


def test_unknown_key_is_reported(folder):
    with pytest.raises(UserError, match=r"no record 'malignant \(9\)'"):
        ShardFolder.open(folder).index_of("malignant (9)")


def flip(path, member: str, bit: int = 1) -> None:
    """Flip a bit in the middle of a tar's member."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    content = bytearray(path.read_bytes())
    content[info.offset_data + info.size // 2] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("member", ["benign (4).png", "benign (4).mask.png", "benign (4).json"])
def test_corrupt_record_is_reported_with_shard_and_key_and_others_stay_readable(folder, member):
    shards = ShardFolder.open(folder)
    flip(folder / "toy-000001.tar", member, bit=128)
    with pytest.raises(UserError, match=r"toy-000001\.tar: record 'benign \(4\)' is corrupt"):
        shards[4]
    assert_same(shards[3], sample(3))


def test_json_with_a_different_class_is_corrupt(folder):
    shards = ShardFolder.open(folder)
    path = folder / "toy-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"class": "benign"', b'"class": "bonign"'))
    with pytest.raises(UserError, match=r"record 'benign \(1\)' is corrupt"):
        shards[1]


def rewrite(path, change) -> None:
    """Rewrite a tar after `change(members)`, a dict of contents by name."""
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    change(members)
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for name, content in members.items():
            key, _, extension = name.partition(".")
            tar.write({"__key__": key, extension: content})


@pytest.mark.parametrize("extension", ["png", "mask.png"])
def test_swapped_png_is_corrupt(folder, extension):
    shards = ShardFolder.open(folder)
    other = {f"benign (1).{extension}": f"benign (2).{extension}"}
    rewrite(folder / "toy-000000.tar", lambda members: members.update((k, members[v]) for k, v in other.items()))
    with pytest.raises(UserError, match=r"record 'benign \(1\)' is corrupt: the sha256 of .* does not match"):
        shards[1]
    assert_same(shards[2], sample(2))


@pytest.mark.parametrize("missing", ["png", "mask.png", "json"])
def test_record_with_a_missing_file_is_corrupt_and_not_unlabeled(folder, missing):
    shards = ShardFolder.open(folder)
    rewrite(folder / "toy-000000.tar", lambda members: members.pop(f"benign (1).{missing}"))
    with pytest.raises(UserError, match=rf"record 'benign \(1\)' is corrupt: benign \(1\)\.{missing} is missing"):
        shards[1]
    assert_same(shards[2], sample(2))


def test_tar_truncated_after_opening_is_reported_with_shard_and_key(folder):
    shards = ShardFolder.open(folder)
    path = folder / "toy-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"toy-000001\.tar: record 'benign \(4\)' is corrupt"):
        shards[4]


def test_folder_can_be_pickled_and_forked_after_files_were_opened(folder):
    shards = ShardFolder.open(folder)
    shards[0]
    assert_same(pickle.loads(pickle.dumps(shards))[1], sample(1))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for i, read in enumerate(pool.map(shards.__getitem__, range(5))):
            assert_same(read, sample(i))


def test_invalid_arrays_are_rejected_and_nothing_is_written(tmp_path):
    good = sample(1)
    for bad in (
        dataclasses.replace(good, image=good.image.astype(np.float32)),
        dataclasses.replace(good, mask=good.mask[:-1]),
        dataclasses.replace(good, mask=good.mask // 255),
    ):
        with pytest.raises(ValueError, match=r"uint8|mask"):
            write_shard(tmp_path / "x.tar", [good, bad])
    assert list(tmp_path.iterdir()) == []
