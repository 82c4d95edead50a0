"""tests/run_of_0_1: a run folder that version 0.1.0 wrote, of this sweep, with its checkpoint after step 2 of 4.

Its config.yaml has the keys of all networks and methods, and nothing in it says what its data contained.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.report import main as report
from mgcc_dist.segment import main as segment
from mgcc_dist.shards import main as shards
from mgcc_dist.train.metrics_logger import read_rows

SAVED = Path(__file__).parent / "run_of_0_1"
RUN = Path("out/phantom/u-net/seed_1-7d2026d3")
OPTIONS = [
    *("--preset", "mgcc_demo", "--loop.seed", "1", "--loop.epochs", "null", "--loop.steps", "4"),
    *("--loop.validate_every", "100", "--data.shards", "shards", "--data.split", "split_1.json"),
    *("--data.image_size", "16", "--data.workers", "0", "--data.batch_labeled", "2", "--data.batch_unlabeled", "0"),
    *("--data.synthetic", "null", "--data.unlabeled", "false", "--method.name", "supervised"),
    *("--network.name", "unet", "--network.widths", "[2, 4]", "--out", str(RUN)),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED, RUN)
    shutil.copy(SAVED / "sweep.yaml", tmp_path)
    return tmp_path / RUN


def test_it_is_resumed_and_other_runs_are_refused(run, monkeypatch):
    write_shards(Phantoms(count=12, seed=0, size=16), Path("shards"))
    shards(["split", "--root", "shards", "--out", "split_1.json"])
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"holds a run with loop\.learning_rate = 0\.1, not 0\.2\. Choose another"):
        segment([*OPTIONS, "--loop.learning_rate", "0.2"])
    segment([*OPTIONS, "--loop.log_every", "2", "--loop.checkpoint_every", "100"])  # which change no result
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"] == [1, 2, 4]
    assert json.loads((run / "result.json").read_text())["steps"] == 4


def test_it_is_reported_in_the_table_of_its_sweep(run, capsys):
    report(["--sweep", "sweep.yaml", "--out", "report.html"])
    assert "sweep: 1 of 1 runs are finished" in capsys.readouterr().out
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    sweep["defaults"]["loop"]["learning_rate"] = 0.2  # another run, in another folder
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    report(["--sweep", "sweep.yaml", "--out", "report.html"])
    assert "sweep: 0 of 1 runs are finished" in capsys.readouterr().out
