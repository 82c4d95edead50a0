"""The benchmark of scale measures what its page says, at toy sizes."""

import json
import sys

import pytest

from benchmarks import scale


def test_stages_are_added_to_a_file(tmp_path, monkeypatch):
    out = tmp_path / "scale.json"
    for words in (["loader", "--images", "2000"], ["ranks"]):
        monkeypatch.setattr(sys, "argv", ["scale", "--out", str(out), "--stages", *words])
        scale.main()
    rows = json.loads(out.read_text())["rows"]
    assert rows["index"]["images"] == 2000
    assert rows["index"]["shards"] == 2
    assert rows["permutation"]["images"] == 40_000
    assert rows["slow ranks"]["ranks"] == 1000


def test_a_checkpoint_has_sixteen_bytes_per_parameter():
    """Weights 4, AdamW 8, EMA 4."""
    row = scale.measure_checkpoint(width=128)["checkpoint"]
    assert row["parameters"] == 4 * 128 * 129
    assert row["bytes_per_parameter"] == pytest.approx(16, rel=0.3)


def test_a_failing_command_is_an_error_with_its_output():
    assert scale.measure(["-c", "print('x' * 2048)"], {})["output_kib"] == 2
    with pytest.raises(RuntimeError, match="no such thing"):
        scale.measure(["-c", "raise SystemExit('no such thing')"], {})
