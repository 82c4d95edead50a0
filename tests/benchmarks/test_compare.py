"""Comparison of result files, and the file that merges the results of a suite."""

import json
from pathlib import Path

import pytest

from benchmarks.collect import collected, plot
from benchmarks.compare import better, comparison, metrics, table
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
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
def test_higher_rates_and_lower_times_are_better(name, a, b, winner):
    assert better(name, a, b) == winner


def test_comparison_lists_common_metrics_and_counts_the_others():
    other = {"device": "gpu", "rows": {"eager": {"steps_per_second": 5.0}, "new": {"ms": 1}}}
    lines = comparison(FILE, other).splitlines()
    assert any(line.split() == ["eager", "/", "steps_per_second", "2", "5", "2.500", "B"] for line in lines)
    assert lines[-1] == "1 metrics in both, 2 only in A, 1 only in B"


def test_metrics_of_a_collected_file_carry_the_name_of_their_part(tmp_path):
    stages = {
        "train_step": {"status": "ran", "result": "train_step.json"},
        "latents": {"status": "failed", "reason": "exit status 1: no data"},
    }
    (tmp_path / "train_step.json").write_text(json.dumps(FILE))
    (tmp_path / "summary.json").write_text(json.dumps({"device": "cpu", "stages": stages}))
    content = collected(tmp_path)
    assert content["device"] == "cpu"
    assert content["not_run"] == {"latents": "exit status 1: no data"}
    assert metrics(content)["train_step / eager / steps_per_second"] == 2.0
    plot(content | {"cores": 2, "commit": "abc"}, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "summary.json").write_text('{"stages": {}}')
    with pytest.raises(UserError, match="no stage has a result"):
        collected(tmp_path)
    with pytest.raises(UserError, match=r"no summary\.json"):
        collected(tmp_path / "none")


def test_table_shows_why_a_row_was_not_run_and_the_settings_of_the_fastest():
    lines = table(FILE).splitlines()
    assert lines[2] == "| eager | 2 | 100 |"
    assert lines[3] == "| tf32 | not run: no GPU |  |"
    assert lines[4] == "| fastest (bf16) | 3 |  |"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_in_the_repository_can_be_compared(path):
    content = read_json(path)
    assert metrics(content)
    text = comparison(content, content)
    assert f"{len(metrics(content))} metrics in both, 0 only in A, 0 only in B" in text
