"""Result files side by side, and what is put together from several."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from benchmarks.busi import before, chosen
from benchmarks.collect import collected
from benchmarks.compare import better, comparison, metrics, table
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep

FILE = {
    "device": "cpu",
    "rows": {
        "eager": {"steps_per_second": 2.0, "peak_memory_mib": 100, "steps_per_second_lowest_highest": [1, 3]},
        "tf32": {"not_run": "no GPU"},
        "fastest": {"steps_per_second": 3.0, "settings": ["bf16"]},
    },
}


@pytest.mark.parametrize(
    ("name", "a", "b", "winner"),
    [
        ("x / steps_per_second", 1, 2, "B"),
        ("x / peak_memory_mib", 1, 2, "A"),
        ("x / milliseconds", 2, 1, "B"),
        ("x / seconds_to_first_step", 1, 1, ""),
        ("x / loss", 1, 2, ""),
        ("seconds / ratio_to_plain", 1, 2, "B"),
    ],
)
def test_better_is_more_of_a_rate_and_less_of_a_time(name, a, b, winner):
    assert better(name, a, b) == winner


def test_comparison_sets_common_figures_side_by_side_and_counts_the_others():
    other = {"device": "gpu", "rows": {"eager": {"steps_per_second": 5.0}, "new": {"ms": 1}}}
    lines = comparison(FILE, other).splitlines()
    assert any(line.split() == ["eager", "/", "steps_per_second", "2", "5", "2.500", "B"] for line in lines)
    assert lines[-1] == "1 metrics in both, 2 only in A, 1 only in B"


def test_figures_of_a_collected_file_carry_the_name_of_their_part(tmp_path):
    (tmp_path / "train_step.json").write_text(json.dumps(FILE))
    (tmp_path / "latents.log").write_text("Traceback\nlatents: exit status 1\n")
    content = collected(tmp_path)
    assert content["not_run"] == {"latents": "latents: exit status 1"}
    assert metrics(content)["train_step / eager / steps_per_second"] == 2.0
    with pytest.raises(UserError, match="holds no result"):
        collected(tmp_path / "none")


def test_table_says_why_a_row_was_not_run_and_what_the_fastest_is_made_of():
    lines = table(FILE).splitlines()
    assert lines[2] == "| eager | 2 | 100 |"
    assert lines[3] == "| tf32 | not run: no GPU |  |"
    assert lines[4] == "| fastest (bf16) | 3 |  |"


def test_busi_trains_u_net_and_mgcc_of_the_first_split_before_all_others_or_what_is_asked_for():
    runs = read_sweep(CONFIGS / "sweeps" / "table_1.yaml").runs
    assert [(run.row, run.seed) for run in chosen(runs)[:3]] == [("U-Net", 1), ("MGCC", 1), ("CMU-Net", 1)]
    assert [run.seed for run in chosen(runs)] == sorted([1, 2, 3] * 9)
    assert {run.dataset for run in chosen(runs)} == {"BUSI"}
    asked = chosen(runs, rows=["MGCC", "U-Net"], seeds=[2])
    assert [(run.row, run.seed) for run in asked] == [("U-Net", 2), ("MGCC", 2)]
    with pytest.raises(UserError, match="no row V-Net on BUSI; there are"):
        chosen(runs, rows=["V-Net"])


@pytest.fixture
def sigint():
    """Python's answer to SIGINT, which a job in the background of a shell script has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_busi_hands_a_signal_on_and_waits_for_the_run_to_save_itself(tmp_path, sigint):
    run = f"""
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(0.2)
    Path("{tmp_path}/saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
Path("{tmp_path}/started").touch()
time.sleep(60)
"""

    def end():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=end).start()
    with pytest.raises(KeyboardInterrupt):
        before(time.monotonic() + 60, [sys.executable, "-c", run])
    assert (tmp_path / "saved").exists()
    (tmp_path / "saved").unlink()
    (tmp_path / "started").unlink()
    assert before(time.monotonic() + 3, [sys.executable, "-c", run]) == 75
    assert before(time.monotonic() + 0.2, ["sleep", "60"]) == 75  # the signal found it without a handler
    assert before(time.monotonic() - 1, ["false"]) is None
