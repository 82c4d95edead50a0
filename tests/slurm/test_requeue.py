"""Preempted jobs requeue and resume, with the results of undisturbed ones."""

import re

import pytest
from jobs import (
    dispatch,
    have_ended,
    job_of,
    last_step,
    read_log,
    restarts,
    send_signal,
    slurm,
    until,
    until_in_slurm,
)
from sweep_files import write_ready_sweep

from mgcc_dist.slurm.worker import ATTEMPTS_FILE, read_attempts
from mgcc_dist.sweep.expansion import read_sweep

pytestmark = pytest.mark.slurm


def test_a_job_signalled_before_training_is_requeued_and_does_not_use_an_attempt(slurm_up, phantom_data, tmp_path):
    sweep = write_ready_sweep(tmp_path, phantom_data, "early", steps=2, seeds=[1])
    runs = read_sweep(sweep).runs
    dispatch("submit", sweep)
    out = tmp_path / "early"
    jobs = [job_of(out, str(run.folder.relative_to(out))) for run in runs]
    for job, run, number in zip(jobs, runs, ("TERM", "USR2"), strict=True):
        until_in_slurm((run.folder / ATTEMPTS_FILE).is_file)  # written before it imports torch
        send_signal(job, number)
        assert read_attempts(run.folder)["attempts"] == 0
    until_in_slurm(lambda: have_ended(job_of(out, "report")))
    for job, run in zip(jobs, runs, strict=True):
        assert (run.folder / "result.json").is_file()
        assert read_attempts(run.folder)["attempts"] == 1
        assert restarts(job) == 1


def test_a_preempted_job_saves_releases_its_nodes_and_resumes(slurm_up, phantom_data, tmp_path):
    resources = {"cpus": 4, "nodes": 2, "environment": {"OMP_NUM_THREADS": "1"}}  # the complete cluster
    changes = {"seeds": [1], "rows": {"MGCC": {}}, "resources": resources, "steps": 100_000}
    sweep = write_ready_sweep(tmp_path, phantom_data, "preempted", **changes)
    out, run = tmp_path / "preempted", read_sweep(sweep).runs[0].folder
    dispatch("submit", sweep)
    job = job_of(out, "phantom")
    until_in_slurm(lambda: last_step(run) >= 3)
    slurm(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        f"--wrap=touch {tmp_path}/urgent",
    )
    until(lambda: restarts(job) == 1)
    until((tmp_path / "urgent").is_file)
    until_in_slurm(lambda: "from step" in read_log(out, job))
    dispatch("cancel", sweep)
    step, *_ = map(int, re.findall(r"stopped by a signal at step (\d+)", read_log(out, job)))
    assert f"from step {step} of 100000" in read_log(out, job)
