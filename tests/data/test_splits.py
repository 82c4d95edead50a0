import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.sample import RecordInfo
from mgcc_dist.data.splits import Split, leaks, locate_split, make_split, read_split, write_split
from mgcc_dist.shards import main

SHIPPED = Path(__file__).parents[2] / "configs" / "splits"
MANY_CASES = settings(deadline=None, derandomize=True, max_examples=100)


def record(key, category="benign", group=None, labeled=True):
    return RecordInfo(key, "x.tar", labeled, category, key if group is None else group)


@st.composite
def cases(draw):
    """Records of one to three classes in groups of any size, and feasible split sizes."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=25))
    records = [
        record(f"key {group} {i}", draw(st.sampled_from(["benign", "malignant", "normal"])), f"group {group}")
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    validation = draw(st.integers(min(sizes), len(records) - 1))  # at least one group fits
    labeled = draw(st.integers(1, len(records) - validation))
    return records, draw(st.integers(0, 1000)), validation, labeled


def exact_shares(records, size):
    """Each class's exact share of `size` records."""
    return {name: size * count / len(records) for name, count in Counter(r.category for r in records).items()}


@MANY_CASES
@given(cases(), st.booleans())
def test_every_record_is_in_exactly_one_subset(case, grouped):
    records, seed, validation, labeled = case
    split = make_split(records, seed, validation, labeled, grouped, "a name")
    assert sorted((*split.labeled, *split.unlabeled, *split.validation)) == sorted(r.key for r in records)
    assert len(split.labeled) == labeled
    assert split.name == "a name"


@MANY_CASES
@given(cases())
def test_random_splits_have_the_requested_sizes_and_are_stratified(case):
    records, seed, validation, labeled = case
    split = make_split(records, seed, validation, labeled, False, "x")
    assert len(split.validation) == validation
    category = {r.key: r.category for r in records}
    train = [r for r in records if r.key not in split.validation]
    # Labeled records are a half of a half ..., each of which is rounded.
    for keys, population, off in ((split.validation, records, 1), (split.labeled, train, 2)):
        counts = Counter(category[key] for key in keys)
        for name, share in exact_shares(population, len(keys)).items():
            assert abs(counts[name] - share) < off


@MANY_CASES
@given(cases())
def test_grouped_splits_keep_groups_together_and_fall_short_only_if_no_group_fits(case):
    records, seed, validation, labeled = case
    split = make_split(records, seed, validation, labeled, True, "x")
    assert leaks(split, records) == []
    validation_groups = {r.group for r in records if r.key in split.validation}
    missing = validation - len(split.validation)
    assert missing >= 0
    others = Counter(r.group for r in records if r.group not in validation_groups)
    assert not missing or min(others.values()) > missing


@MANY_CASES
@given(cases(), st.booleans(), st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_records(case, grouped, random):
    records, seed, validation, labeled = case
    split = make_split(records, seed, validation, labeled, grouped, "x")
    random.shuffle(records)
    assert make_split(records, seed, validation, labeled, grouped, "x") == split


def test_another_seed_gives_another_split():
    records = [record(f"key {i}") for i in range(40)]
    splits = {make_split(records, seed, 10, 15, False, "x").validation for seed in range(5)}
    assert len(splits) == 5


@pytest.mark.parametrize(("validation", "labeled"), [(0, 1), (4, 1), (2, 3), (2, 0)])
def test_infeasible_sizes_are_rejected(validation, labeled):
    with pytest.raises(UserError, match=f"cannot take {validation} validation and {labeled} labeled"):
        make_split([record(f"key {i}") for i in range(4)], 0, validation, labeled, False, "x")


@MANY_CASES
@given(cases(), st.booleans(), st.data())
def test_records_without_a_mask_are_unlabeled_unless_their_group_is_in_validation(case, grouped, data):
    records, seed, validation, labeled = case
    groups = [*sorted({r.group for r in records}), "of its own"]
    more = [
        record(f"more {i}", group=data.draw(st.sampled_from(groups)), labeled=False)
        for i in range(data.draw(st.integers(1, 8)))
    ]
    alone = make_split(records, seed, validation, labeled, grouped, "x")
    split = make_split([*more, *records], seed, validation, labeled, grouped, "x")
    assert (split.labeled, split.validation) == (alone.labeled, alone.validation)
    held_out = {r.group for r in records if r.key in split.validation} if grouped else set()
    added = [r.key for r in more if r.group not in held_out]
    assert split.unlabeled == tuple(sorted([*alone.unlabeled, *added]))


def test_a_grouped_split_without_validation_records_is_an_error_that_says_what_is_possible():
    videos = [record(f"{video} {i:02}", group=video) for video in ("v1", "v2") for i in range(15)]
    message = r"x: no group fits into 9 validation records\. There are 2 groups, the smallest with 15 of 30 records\. "
    with pytest.raises(UserError, match=message + r"Use --validation 0\.5 or more, or split without --grouped"):
        make_split(videos, 0, 9, 10, True, "x")
    assert len(make_split(videos, 0, 15, 10, True, "x").validation) == 15
    one_group = [record(f"{i}", group="v") for i in range(6)]
    with pytest.raises(
        UserError, match=r"There are 1 groups, .* Split without --grouped, or convert with other groups"
    ):
        make_split(one_group, 0, 3, 3, True, "x")


@MANY_CASES
@given(cases(), st.booleans())
def test_without_any_mask_all_records_are_split_and_none_is_labeled(case, grouped):
    records, seed, validation, labeled = case
    unlabeled = [record(r.key, r.category, r.group, labeled=False) for r in records]
    split = make_split(unlabeled, seed, validation, 0, grouped, "x")
    assert split.labeled == ()
    assert split.validation == make_split(records, seed, validation, labeled, grouped, "x").validation
    assert {*split.unlabeled, *split.validation} == {r.key for r in records}
    with pytest.raises(UserError, match=rf"x: cannot take {validation} validation and 1 labeled"):
        make_split(unlabeled, seed, validation, 1, grouped, "x")


def test_a_misspelt_shipped_split_is_answered_with_the_nearest():
    assert locate_split("busi_random_1").is_file()
    with pytest.raises(UserError, match=r"^busi_radnom_1: no split file .* Did you mean busi_random_1\?$"):
        locate_split("busi_radnom_1")
    with pytest.raises(UserError, match=r"Shipped splits: busi_fold_1, "):
        locate_split("out/mine.json")


def test_leaks_are_counted_per_validation_image():
    records = [record("a", group="1"), record("b", group="1"), record("c", group="1"), record("d"), record("e")]
    assert leaks(Split("x", ("a", "d"), (), ("b", "c", "e")), records) == ["b", "c"]
    assert leaks(Split("x", ("d",), ("a",), ("b", "c", "e")), records) == ["b", "c"]
    assert leaks(Split("x", ("d",), (), ("a", "b", "c", "e")), records) == []


def test_a_written_split_is_read_back(tmp_path):
    split = Split("mine", ("a", "b"), (), ("c",))
    write_split(tmp_path / "mine.json", split, seed=3, notes="by hand")
    assert read_split(tmp_path / "mine.json") == split
    assert json.loads((tmp_path / "mine.json").read_text())["notes"] == "by hand"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labeled": ["a", "a"]}, "'a' is in labeled and labeled"),
        ({"validation": ["b"]}, "'b' is in unlabeled and validation"),
        ({"labeled": None}, "'labeled' must be a list of keys"),
        ({"unlabeled": [1]}, "'unlabeled' must be a list of keys"),
        ({"format": "other"}, "not a mgcc-dist split file"),
        ({"version": 2}, "has version 2, not 1"),
    ],
)
def test_an_invalid_split_file_is_rejected(tmp_path, change, expected):
    path = tmp_path / "mine.json"
    write_split(path, Split("mine", ("a",), ("b",), ("c",)))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=expected):
        read_split(path)


def test_missing_or_damaged_split_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"mine\.json: does not exist"):
        read_split(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json: is not JSON"):
        read_split(tmp_path / "mine.json")


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shipped_busi_splits_have_the_paper_s_sizes(kind, seed):
    split = read_split(SHIPPED / f"busi_{kind}_{seed}.json")
    assert (len(split.labeled), len(split.unlabeled), len(split.validation)) == (263, 263, 254)
    assert split.name == f"busi_{kind}_{seed}"
    for keys, exact in ((split.validation, (142.3, 68.4, 43.3)), (split.labeled, (147.3, 70.8, 44.8))):
        counts = Counter(key.split()[0] for key in keys)
        for category, share in zip(("benign", "malignant", "normal"), exact, strict=True):
            assert abs(counts[category] - share) < 1


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shipped_busi_splits_are_reproduced_by_the_command_they_name(busi_shards, tmp_path, kind, seed):
    name = f"busi_{kind}_{seed}.json"
    command = json.loads((SHIPPED / name).read_text())["made_by"].split()
    assert command[:3] == ["python", "-m", "mgcc_dist.shards"]
    main([*command[3:], "--root", str(busi_shards.folder), "--out", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_random_busi_splits_leak_near_duplicates_and_grouped_ones_do_not(busi_shards):
    counts = {
        kind: [len(leaks(read_split(SHIPPED / f"busi_{kind}_{seed}.json"), busi_shards.records)) for seed in (1, 2, 3)]
        for kind in ("random", "grouped")
    }
    assert counts == {"random": [82, 80, 77], "grouped": [0, 0, 0]}
