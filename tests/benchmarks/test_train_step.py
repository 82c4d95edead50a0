"""The ladder of settings: what the last rung is made of, and what is left when time is short."""

import sys

import pytest

from benchmarks import train_step
from mgcc_dist.common.files import read_json

SPEEDS = {"plain": 1.0, "eager": 2.0, "channels_last": 3.0, "bf16": 1.9, "phase_upconv": 2.5, "two_forwards": 9.0}


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """Runs the program without its steps; gives the rows it wrote."""

    def run(*words):
        out = tmp_path / "ladder.json"
        monkeypatch.setattr(sys, "argv", ["train_step", "--out", str(out), *words])
        train_step.main()
        return read_json(out)["rows"]

    def measured(name, rung, case):
        return {"steps_per_second": SPEEDS[name]} if name in SPEEDS else {"steps_per_second": 8.0, "rung": str(rung)}

    monkeypatch.setattr(train_step, "_in_a_process", measured)
    return run


def test_the_last_rung_has_the_settings_that_helped_and_never_two_forwards(ladder):
    rows = ladder("--rungs", "channels_last", "bf16", "phase_upconv", "two_forwards")
    assert rows["fastest"]["settings"] == ["channels_last", "phase_upconv"]
    assert "channels_last=True" in rows["fastest"]["rung"]
    assert "two_forwards=False" in rows["fastest"]["rung"]
    assert rows["channels_last"]["ratio_to_eager"] == 1.5
    assert rows["fastest"]["ratio_to_plain"] == 8.0


def test_rungs_whose_turn_comes_too_late_are_listed_and_the_last_one_is_measured(ladder):
    rows = ladder("--rungs", "channels_last", "--seconds", "0")
    assert rows["plain"]["steps_per_second"] == 1.0
    assert rows["channels_last"]["not_run"] == "its turn came after --seconds 0"
    assert rows["fastest"]["settings"] == []
