"""The identity of a run: what changes it and what does not."""

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.identity import describe_difference, differing_keys, digest, identity, input_keys
from mgcc_dist.common.options import data_input, neutral

NAMES = st.text("abcdefgh", min_size=1, max_size=3).map(lambda text: f"{text}_")  # no keyword
VALUES = st.one_of(st.integers(0, 3), st.sampled_from([0.5, 1.5]), st.booleans(), st.sampled_from(["x", "y", None]))
FIELDS = st.dictionaries(NAMES, st.tuples(VALUES, VALUES), max_size=4)  # name -> default, value


@dataclass(frozen=True)
class Base:
    name: str = ""


@dataclass(frozen=True)
class Wide(Base):
    name: str = "wide"
    width: int = 4


@dataclass(frozen=True)
class Deep(Base):
    name: str = "deep"
    depth: int = 2
    rate: float = 0.5


@dataclass(frozen=True)
class Loop:
    seed: int = 0
    epochs: float = 300.0
    log_every: int = neutral(10)


@dataclass(frozen=True)
class Run:
    shards: str = data_input()
    others: tuple[str, ...] = data_input(())
    net: Base = field(default_factory=Wide)
    loop: Loop = field(default_factory=Loop)
    out: str = neutral("out")


def build(fields, extra=()):
    """An instance with these fields, of which each has a default, and a class of `extra` ones at their defaults."""
    specs = [(name, object, field(default=default)) for name, (default, _) in fields.items()]
    return dataclasses.make_dataclass("Section", [*specs, *extra])(
        **{name: value for name, (_, value) in fields.items()}
    )


def nested(section):
    return dataclasses.make_dataclass("Config", [("section", object)])(section)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(FIELDS, st.lists(st.tuples(NAMES, VALUES), unique_by=lambda pair: pair[0], max_size=3), st.randoms())
def test_a_new_key_at_its_default_and_the_order_of_keys_change_nothing(fields, added, random):
    extra = [(f"new_{name}", object, field(default=default)) for name, default in added]
    before = identity(nested(build(fields)))
    shuffled = list(fields.items())
    random.shuffle(shuffled)
    assert identity(nested(build(dict(shuffled), extra))) == before
    assert digest(identity(nested(build(dict(shuffled), extra)))) == digest(before)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(FIELDS, st.data())
def test_every_key_that_is_not_neutral_changes_the_identity(fields, data):
    before = build(fields)
    for name, (_, value) in fields.items():
        other = data.draw(VALUES.filter(lambda new, value=value: new != value))
        after = dataclasses.replace(before, **{name: other})
        assert identity(nested(after)) != identity(nested(before))
        assert [key for key, _, _ in differing_keys(nested(before), nested(after))] == [f"section.{name}"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(), st.text())
def test_neutral_keys_change_nothing(log_every, out):
    run = Run("a")
    assert identity(dataclasses.replace(run, loop=Loop(log_every=log_every), out=out)) == identity(run)


def test_keys_are_compared_with_the_defaults_of_the_chosen_component():
    assert identity(Run("a")) == {"shards": "a"}
    assert identity(Run("a", net=Wide(width=8))) == {"shards": "a", "net.width": 8}
    assert identity(Run("a", net=Deep())) == {"shards": "a", "net.name": "deep"}
    assert identity(Run("a", net=Deep(depth=3))) == {"shards": "a", "net.name": "deep", "net.depth": 3}


def test_a_component_without_a_default_is_always_named():
    required = dataclasses.make_dataclass("Config", [("net", Base)])
    assert identity(required(Wide())) == {"net.name": "wide"}


def test_a_number_identifies_the_same_run_with_and_without_a_decimal_point():
    assert digest(identity(Run("a", loop=Loop(epochs=5)))) == digest(identity(Run("a", loop=Loop(epochs=5.0))))


def test_digests_stay_the_same_between_versions():
    """Folder names of sweeps contain them."""
    run = Run("a", others=("b", "c"), net=Deep(rate=0.25), loop=Loop(seed=1))
    assert digest(identity(run)) == "b64bb98c"


@pytest.mark.parametrize(
    ("then", "now", "differs"),
    [
        ({"a": "1"}, {"b": "1"}, False),
        ({"a": "1"}, {"b": "2"}, True),
        ({"a": "1"}, {}, True),
        ({}, {"b": "1"}, True),
        ({}, {}, True),
    ],
)
def test_data_under_another_path_is_the_same_if_its_content_is_known_to_be(then, now, differs):
    assert [key for key, _, _ in differing_keys(Run("a"), Run("b"), then, now)] == (["shards"] if differs else [])


def test_data_under_the_same_path_is_the_same_key_whatever_its_content():
    """Changed content is an error of its own, which names the file (run_folder.check_inputs)."""
    assert not differing_keys(Run("a"), Run("a"), {"a": "1"}, {"a": "2"})
    assert not differing_keys(
        Run("a", ("x", "y")), Run("b", ("y", "x")), {"a": "1", "x": "2", "y": "3"}, {"b": "1"} | {"y": "2", "x": "3"}
    )


def test_a_difference_is_described_by_its_component_first():
    differing = differing_keys(Run("a", loop=Loop(seed=1)), Run("b", net=Deep(depth=3)))
    assert [key for key, _, _ in differing] == ["net.name", "loop.seed", "net.depth", "shards"]
    assert describe_difference(differing) == ("net.name", "wide", "deep", " (and 3 more keys)")
    assert describe_difference(differing[3:]) == ("shards", "a", "b", "")


def test_keys_that_name_data_are_listed():
    assert input_keys(Run("a")) == {"shards", "others"}
