"""Commands of `mgcc slurm` on the testbed: a complete table, failures, cancellation, rejected resources."""

import pytest
import yaml
from jobs import dispatch, have_ended, job_of, last_step, queue, restarts, until_in_slurm
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.files import read_json
from mgcc_dist.sweep.expansion import read_sweep

pytestmark = pytest.mark.slurm

ONE_ROW = {"rows": {"U-Net": SUPERVISED}, "reference": None}


def test_a_table_is_one_array_and_one_report_and_a_second_submission_starts_nothing(slurm_up, phantom_data, tmp_path):
    sweep = write_ready_sweep(tmp_path, phantom_data, "tiny", steps=4, image_size=16, seeds=[1, 2], **ONE_ROW)
    out = tmp_path / "tiny"
    assert "3 tasks submitted in 2 jobs" in dispatch("submit", sweep)
    jobs = read_json(out / "jobs.json")["jobs"]
    runs = [job for name, job in jobs.items() if name.startswith("phantom/")]
    assert {job.partition("_")[0] for job in runs} == {runs[0].partition("_")[0]}
    assert sorted(int(job.partition("_")[2]) for job in runs) == list(range(2))

    assert "3 tasks: 3 done" in dispatch("status", sweep, "--watch", "--every", "2")
    assert "2 of 2 runs are finished" in dispatch("logs", sweep, "report")
    page = (out / "report.html").read_text()
    assert page.count("±") >= 2

    assert "nothing to submit; 3 tasks: 3 done" in dispatch("submit", sweep)
    assert read_json(out / "jobs.json")["jobs"] == jobs
    until_in_slurm(lambda: have_ended(*jobs.values()))
    assert "at the best step" in dispatch("logs", sweep, "phantom/u-net/seed_2")
    assert "must be the beginning of exactly one task name" in dispatch("logs", sweep, "phantom/u-net", code=2)


def test_a_changed_config_is_a_new_run_and_the_old_folder_is_listed(slurm_up, phantom_data, tmp_path):
    sweep = write_ready_sweep(tmp_path, phantom_data, "changed", seeds=[1])
    old = read_sweep(sweep).runs[0].folder
    old.mkdir(parents=True)
    (old / "result.json").write_text("{}")
    sweep = write_ready_sweep(tmp_path, phantom_data, "changed", steps=31, seeds=[1])
    output = dispatch("submit", sweep, "--dry-run")
    assert f"{old}: finished, but with another config; ignored" in output
    assert "3 tasks in 2 jobs were not submitted" in output


FAILING = {
    "U-Net": SUPERVISED,
    "Broken": SUPERVISED | {"loop": {"learning_rate": 1e30}},  # diverges: not worth another attempt
    "Poison": SUPERVISED | {"loop": {"optimizer": {"momentum": 0.5}}},  # crashes until the second submission
}


def import_that_kills(folder):
    """Write a folder for PYTHONPATH in which `import torch` kills the process, as the kernel's OOM killer does."""
    (folder / "poison").mkdir()
    (folder / "poison" / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    return folder / "poison"


def test_failed_runs_are_shown_and_only_they_are_resumed(slurm_up, phantom_data, tmp_path):
    changes = {"seeds": [1], "steps": 4, "reference": None}
    killing = {"setup": [f"export PYTHONPATH={import_that_kills(tmp_path)}"], "attempts": 2}
    rows = FAILING | {"Poison": FAILING["Poison"] | {"resources": killing}}
    sweep = write_ready_sweep(tmp_path, phantom_data, "failing", rows=rows, **changes)
    out = tmp_path / "failing"
    dispatch("submit", sweep)
    poison = job_of(out, "phantom/poison")  # Slurm may start the dependents of a requeued job
    until_in_slurm(lambda: restarts(poison) == 1 and have_ended(poison, job_of(out, "report")))

    output = dispatch("status", sweep, code=1)
    assert "4 tasks: 2 done, 2 failed" in output
    assert "the loss is not finite" in output
    assert "attempt 2 of 2 from step 0: giving up" in output, output
    assert restarts(job_of(out, "phantom/broken")) == 0
    assert restarts(job_of(out, "phantom/poison")) == 1
    assert "1 of 3 runs are finished\n  Broken on Phantom: 0 of 1, 1 unfinished\n" in dispatch("logs", sweep, "report")
    assert "2 failed earlier. Run `mgcc slurm resume" in dispatch("submit", sweep)

    sweep = write_ready_sweep(tmp_path, phantom_data, "failing", rows=FAILING, **changes)
    before = job_of(out, "phantom/u-net")
    assert "3 tasks submitted" in dispatch("resume", sweep)
    assert job_of(out, "phantom/u-net") == before
    until_in_slurm(lambda: have_ended(job_of(out, "report")))
    assert "4 tasks: 3 done, 1 failed" in dispatch("status", sweep, code=1)
    assert "2 of 3 runs are finished" in dispatch("logs", sweep, "report")


def test_a_cancelled_run_saves_and_is_resumed_only_by_resume(slurm_up, phantom_data, tmp_path):
    sweep = write_ready_sweep(tmp_path, phantom_data, "cancelled", steps=100_000, seeds=[1], **ONE_ROW)
    out, run = tmp_path / "cancelled", read_sweep(sweep).runs[0].folder
    for command in ("submit", "resume"):
        previous = last_step(run)
        dispatch(command, sweep)
        job = job_of(out, "phantom")
        until_in_slurm(lambda previous=previous: last_step(run) >= previous + 3)
        assert "2 tasks cancelled" in dispatch("cancel", sweep)
        until_in_slurm(lambda job=job: have_ended(job))
        assert restarts(job) == 0
        assert (run / "checkpoints" / f"step-{last_step(run):08d}").is_dir()
        assert "cancelled" in dispatch("status", sweep, code=1)
    assert "nothing is pending or running" in dispatch("cancel", sweep)
    assert f"from step {previous} of 100000" in dispatch("logs", sweep, "phantom")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"partition": "nowhere"}, "partition: 'nowhere' does not exist. Choose from: debug, urgent"),
        ({"time": "2-00:00:00"}, "time: 2-00:00:00 exceeds the limit 1-00:00:00 of partition debug"),
        ({"cpus": 64}, "Slurm rejects the resources"),
    ],
)
def test_impossible_resources_are_rejected_before_anything_is_submitted(
    slurm_up, phantom_data, tmp_path, requested, message
):
    sweep = write_ready_sweep(tmp_path, phantom_data, "impossible", resources={})
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(requested))
    before = queue()
    assert message in dispatch("submit", sweep, "--cluster-file", str(cluster), code=2)
    assert queue() == before
    assert not (tmp_path / "impossible" / "jobs.json").exists()


def test_a_thousand_runs_are_two_calls_of_sbatch(slurm_up, phantom_data, tmp_path):
    resources = {"cpus": 1, "memory_gb": 1, "extra": {"hold": True}}
    sweep = write_ready_sweep(tmp_path, phantom_data, "thousand", seeds=list(range(1, 501)), resources=resources)
    assert "1001 tasks submitted in 2 jobs" in dispatch("submit", sweep)
    jobs = read_json(tmp_path / "thousand" / "jobs.json")["jobs"].values()
    assert len({job.partition("_")[0] for job in jobs}) == 2
    assert "1001 tasks: 1001 pending" in dispatch("status", sweep)
    assert "1001 tasks cancelled" in dispatch("cancel", sweep)
    until_in_slurm(lambda: have_ended(*jobs))
    assert "1001 tasks: 1001 failed" in dispatch("status", sweep, code=1)
