"""The training-step benchmark: its rows, what the last row combines, and what is left out when time is short."""

import sys
from dataclasses import replace

import pytest

from benchmarks import train_step
from benchmarks.step import SETTINGS, StepConfig, StepSettings
from benchmarks.train_step import COMBINATIONS, EAGER, PLAIN, Row, enabled, measure, measure_in_process
from mgcc_dist.common.files import read_json

TINY = StepConfig(16, (4, 8), batch=1, steps=3, device="cpu", threads=1)
SPEEDS = {"plain": 1.0, "eager": 2.0, "channels_last": 3.0, "bf16": 1.9, "phase_upconv": 2.5, "two_forwards": 9.0}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs the program without its steps; returns the rows that it wrote."""

    def run(*words):
        out = tmp_path / "train_step.json"
        monkeypatch.setattr(sys, "argv", ["train_step", "--out", str(out), *words])
        train_step.main()
        return read_json(out)["rows"]

    def measured(row, config, limit):
        speed = {"steps_per_second": SPEEDS.get(row.name, 8.0)}
        return speed if row.name in SPEEDS else speed | {"measured": str(row.settings)}

    monkeypatch.setattr(train_step, "measure_in_process", measured)
    return run


def test_fastest_combines_the_settings_that_helped_and_never_two_forwards(program):
    rows = program("--ablate", "channels_last", "bf16", "phase_upconv", "two_forwards")
    assert rows["fastest"]["settings"] == ["channels_last", "phase_upconv"]
    assert "channels_last=True" in rows["fastest"]["measured"]
    assert "two_forwards=False" in rows["fastest"]["measured"]
    assert rows["channels_last"]["ratio_to_eager"] == 1.5
    assert rows["fastest"]["ratio_to_plain"] == 8.0


def test_fastest_has_one_of_the_two_kernel_settings(program, monkeypatch):
    monkeypatch.setitem(SPEEDS, "fused_kernels", 4.0)
    monkeypatch.setitem(SPEEDS, "auto_kernels", 5.0)
    rows = program("--ablate", "fused_kernels", "auto_kernels")
    assert rows["fastest"]["settings"] == ["auto_kernels"]


def test_rows_that_do_not_fit_are_listed(program):
    rows = program("--ablate", "channels_last", "--seconds", "0")
    for name in ("plain", "eager", "channels_last"):
        assert rows[name]["not_run"].endswith("0 s were left")
    assert rows["fastest"]["settings"] == []


def test_combinations_that_would_end_too_late_are_listed(program):
    rows = program("--combinations", "--seconds", "30")
    assert list(rows) == [row.name for row in COMBINATIONS]
    for row in COMBINATIONS:
        assert ("not_run" in rows[row.name]) == (row.seconds > 30)


def test_combinations_have_distinct_names_and_settings_that_exist():
    assert len({row.name for row in COMBINATIONS}) == len(COMBINATIONS)
    assert PLAIN in COMBINATIONS
    assert EAGER in COMBINATIONS
    for row in COMBINATIONS:
        if row not in (PLAIN, EAGER):
            assert set(row.name.split()) <= set(SETTINGS)
            assert row.settings == enabled(row.name.split()) != StepSettings()


@pytest.mark.parametrize("settings", [None, StepSettings(channels_last=True)])
def test_a_row_has_speed_memory_and_loss(settings):
    row = measure(settings, TINY)
    low, high = row["steps_per_second_lowest_highest"]
    assert 0 < low <= row["steps_per_second"] <= high
    assert row["steps_per_processor_second"] > 0
    assert row["peak_memory_mib"] > 0
    assert 0 < row["loss"] < 10
    assert row["loss_after_steps"] == 6


def test_a_row_that_fails_or_is_unsupported_or_late_gives_its_reason():
    tf32 = measure_in_process(Row("tf32", StepSettings(tf32=True)), TINY, limit=60)
    assert tf32 == {"not_run": "tf32 needs a CUDA device"}
    too_deep = measure_in_process(EAGER, replace(TINY, size=5), limit=60)
    assert too_deep["not_run"].startswith(("ValueError", "RuntimeError", "UserError"))
    assert "stopped after 0 s" in measure_in_process(EAGER, TINY, limit=0)["not_run"]
