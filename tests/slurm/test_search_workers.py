"""A search on the testbed: two workers share a study, and a trial whose worker is killed is resumed."""

from pathlib import Path

import psutil
import pytest
from jobs import dispatch, have_ended, job_of, last_step, rank_of, restarts, until_in_slurm
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.train.metrics_logger import read_rows

pytest.importorskip("optuna")

pytestmark = pytest.mark.slurm

STEPS = 60
TRIALS = 3


def trial_in(job: str, logs: Path) -> tuple[psutil.Process, Path] | None:
    """Return a worker's process and the folder of the trial that it trains, after a few steps."""
    worker = rank_of(job, logs)
    try:
        children = [child.cmdline() for child in worker.children()] if worker else []
    except psutil.Error:
        return None
    trials = [Path(words[-1]).parent for words in children if words]
    return next(((worker, trial) for trial in trials if last_step(trial) >= 3), None)


def test_two_workers_share_a_study_and_a_killed_one_resumes_its_trial(slurm_up, phantom_data, tmp_path):
    from mgcc_dist.sweep.worker import open_study

    search = {
        "row": "U-Net",
        "dataset": "Phantom",
        "workers": 2,
        "study": {"trials": TRIALS, "sampler": "random", "pruner": "none"},
        "space": {"loop.learning_rate": {"low": 0.001, "high": 0.1, "log": True}},
    }
    changes = {"seeds": [], "rows": {"U-Net": SUPERVISED}, "reference": None, "search": search}
    sweep = write_ready_sweep(tmp_path, phantom_data, "search", steps=STEPS, image_size=16, **changes)
    out = tmp_path / "search"
    assert "2 tasks submitted in 1 jobs" in dispatch("submit", sweep)
    jobs = [job_of(out, f"search/worker_{worker}") for worker in range(2)]
    worker, folder = until_in_slurm(lambda: trial_in(jobs[0], out / "jobs"))
    worker.kill()
    until_in_slurm(lambda: have_ended(*jobs))

    assert "2 tasks: 2 done" in dispatch("status", sweep)
    assert [restarts(job) for job in jobs] == [1, 0]
    found = read_sweep(sweep).search
    trials = open_study(found).trials
    assert [each.state.name for each in trials] == ["COMPLETE"] * TRIALS
    for number in range(TRIALS):
        rows = read_rows(found.folder / f"trial_{number:04d}" / "metrics.jsonl")
        assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, STEPS + 1))
    starts = {each.number: each.user_attrs["attempts"] for each in trials}
    assert starts == {number: 1 + (folder.name == f"trial_{number:04d}") for number in range(TRIALS)}
    best = max(trials, key=lambda each: each.value)
    config = parse(SegmentConfig, ["--config", str(found.folder / "best.yaml")], CONFIGS / "segment")
    assert config.loop.learning_rate == best.params["loop.learning_rate"]
