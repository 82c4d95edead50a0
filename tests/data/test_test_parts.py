"""Test parts of splits: drawn, k folds, published folds; nested fractions of labels."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.sample import RecordInfo
from mgcc_dist.data.splits import (
    Split,
    choose_test,
    leaks,
    make_folds,
    make_split,
    published_folds,
    read_split,
    write_split,
)
from mgcc_dist.shards import main

SHIPPED = Path(__file__).parents[2] / "configs" / "splits"
MANY_CASES = settings(deadline=None, derandomize=True, max_examples=100)


def record(key, category="benign", group=None, labeled=True, fold=""):
    return RecordInfo(key, "x.tar", labeled, category, key if group is None else group, fold)


@st.composite
def records_in_groups(draw, largest=5):
    """Records of one to three classes in 16 to 30 groups."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=16, max_size=30))
    return [
        record(f"key {group} {i}", draw(st.sampled_from(["benign", "malignant", "normal"])), f"group {group}")
        for group, size in enumerate(sizes)
        for i in range(size)
    ]


def parts_of(split):
    return [split.labeled + split.unlabeled, split.validation, split.test]


@MANY_CASES
@given(records_in_groups(), st.integers(2, 5), st.integers(0, 99), st.booleans(), st.randoms(use_true_random=False))
def test_folds_partition_the_records_and_no_group_is_on_two_sides(records, count, seed, grouped, random):
    folds = make_folds(records, seed, count, grouped, "x")
    assert len(folds) == count
    assert all(folds)
    assert sorted(key for fold in folds for key in fold) == sorted(each.key for each in records)
    if grouped:
        group = {each.key: each.group for each in records}
        fold_of = {(group[key], i) for i, fold in enumerate(folds) for key in fold}
        assert len(fold_of) == len({each.group for each in records})
    random.shuffle(records)
    assert make_folds(records, seed, count, grouped, "x") == folds


@MANY_CASES
@given(records_in_groups(largest=1), st.integers(2, 5), st.integers(0, 99))
def test_folds_are_stratified(records, count, seed):
    category = {each.key: each.category for each in records}
    folds = [Counter(category[key] for key in fold) for fold in make_folds(records, seed, count, True, "x")]
    for name in set(category.values()):
        assert max(fold[name] for fold in folds) - min(fold[name] for fold in folds) <= 1


@MANY_CASES
@given(records_in_groups(), st.integers(0, 99), st.booleans())
def test_training_validation_and_test_share_no_group(records, seed, grouped):
    test = choose_test(records, seed, max(5, len(records) // 4), grouped, "x")
    split = make_split(records, seed, 5, 1, grouped, "x", test)
    assert split.test == test
    assert sorted(key for part in parts_of(split) for key in part) == sorted(each.key for each in records)
    if grouped:
        group = {each.key: each.group for each in records}
        groups = [{group[key] for key in part} for part in parts_of(split)]
        assert sum(map(len, groups)) == len(set.union(*groups))
        assert leaks(split, records) == leaks(split, records, "test") == []


@MANY_CASES
@given(records_in_groups(), st.integers(0, 99), st.booleans())
def test_fractions_of_labels_are_nested_on_the_same_validation_and_test_records(records, seed, grouped):
    test = choose_test(records, seed, 5, grouped, "x")
    most = len(records) - len(test) - 5
    larger = None
    for fraction in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16):
        split = make_split(records, seed, 5, max(1, round(fraction * most)), grouped, "x", test)
        if larger:
            assert set(split.labeled) <= set(larger.labeled)
            assert (split.validation, split.test) == (larger.validation, larger.test)
        larger = split


def test_too_many_folds_and_test_parts_without_a_fitting_group_are_errors():
    videos = [record(f"{video} {i}", group=video) for video in ("v1", "v2") for i in range(5)]
    with pytest.raises(UserError, match=r"^x: cannot make 3 folds of 2 groups with masks$"):
        make_folds(videos, 0, 3, True, "x")
    with pytest.raises(UserError, match=r"x: test: no group fits into 2 test records\. .* Use --test 0\.5 or more"):
        choose_test(videos, 0, 2, True, "x")
    assert len(choose_test(videos, 0, 2, False, "x")) == 2


def test_published_folds_are_test_parts_or_validation_parts_of_a_fixed_test_part():
    crossed = [record("a", fold="1"), record("b", fold="2"), record("c", fold="2")]
    assert published_folds(crossed, "x") == {"1": (["a"], []), "2": (["b", "c"], [])}
    fixed = [record("a", fold="0"), record("b", fold="1"), record("t", fold="test"), record("extra")]
    assert published_folds(fixed, "x") == {"0": (["t"], ["a"]), "1": (["t"], ["b"])}
    with pytest.raises(UserError, match=r"^x: has no published folds\. Convert BUS-BRA with its 5-fold-cv"):
        published_folds([record("a")], "x")


def test_a_split_with_a_test_part_is_read_back_and_one_without_is_written_as_before(tmp_path):
    split = Split("mine", ("a",), ("b",), ("c",), ("d", "e"))
    write_split(tmp_path / "mine.json", split)
    assert read_split(tmp_path / "mine.json") == split
    write_split(tmp_path / "old.json", Split("old", ("a",), ("b",), ("c",)))
    assert "test" not in (tmp_path / "old.json").read_text()
    assert read_split(tmp_path / "old.json").test == ()
    content = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**content, "test": ["c"]}))
    with pytest.raises(UserError, match="'c' is in validation and test"):
        read_split(tmp_path / "mine.json")


def test_folds_of_a_shard_folder_are_files_with_every_record_in_one_test_part(phantom_shards, tmp_path, capsys):
    command = ["split", "--root", str(phantom_shards.folder), "--out", str(tmp_path / "x.json"), "--grouped"]
    main([*command, "--folds", "3", "--validation", "0.25"])
    splits = [read_split(tmp_path / f"x_{i}.json") for i in (1, 2, 3)]
    assert sorted(key for split in splits for key in split.test) == sorted(phantom_shards.keys())
    assert [split.name for split in splits] == ["x_1", "x_2", "x_3"]
    assert {tuple(map(len, parts_of(split))) for split in splits} == {(12, 4, 8)}
    assert "x_3.json: 6 labeled, 6 unlabeled, 4 validation, 8 test" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--test, --folds and --published-folds: choose one of them$"):
        main([*command, "--folds", "3", "--test", "0.2"])


SHIPPED_COMMANDS = {"busi_fold_1": "busi_fold", "busi_test_1": "", "busi_test_quarter_1": "", "busi_test_eighth_1": ""}


@pytest.mark.parametrize("name", SHIPPED_COMMANDS)
def test_shipped_test_parts_of_busi_are_reproduced_by_the_command_they_name(busi_shards, tmp_path, name):
    command = json.loads((SHIPPED / f"{name}.json").read_text())["made_by"].split()[3:]
    out = tmp_path / f"{SHIPPED_COMMANDS[name] or name}.json"
    main([*command, "--root", str(busi_shards.folder), "--out", str(out)])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()
        split = read_split(path)
        assert leaks(split, busi_shards.records) == leaks(split, busi_shards.records, "test") == []
    assert len(list(tmp_path.iterdir())) == (5 if SHIPPED_COMMANDS[name] else 1)


def test_shipped_busi_folds_have_every_image_in_one_test_part():
    folds = [read_split(SHIPPED / f"busi_fold_{i}.json") for i in range(1, 6)]
    assert sorted(Counter(key for fold in folds for key in fold.test).values()) == [1] * 780
    half, quarter, eighth = (read_split(SHIPPED / f"busi_test{name}_1.json") for name in ("", "_quarter", "_eighth"))
    assert set(eighth.labeled) < set(quarter.labeled) < set(half.labeled)
    assert half.validation == quarter.validation == eighth.validation
    assert half.test == quarter.test == eighth.test
    assert (len(half.labeled), len(quarter.labeled), len(eighth.labeled)) == (281, 140, 70)
