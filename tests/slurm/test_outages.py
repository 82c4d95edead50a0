"""Time limits, cancelling sites, dead nodes and stopped daemons: every run ends as an undisturbed one."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from daemons import stopped
from jobs import (
    dispatch,
    have_ended,
    job_of,
    last_step,
    read_log,
    restarts,
    run_without_slurm,
    slurm,
    until,
    until_in_slurm,
)
from same_run import assert_same_run
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.fence import FENCE
from mgcc_dist.common.files import read_json
from mgcc_dist.sweep.expansion import read_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

ONE_RUN = {"seeds": [1], "rows": {"U-Net": SUPERVISED}, "reference": None}
RESOURCES = {"cpus": 1, "memory_gb": 1, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}}
STEPS, ENDLESS = 400, 100_000


def submit(folder: Path, data: Path, name: str, steps: int, **resources) -> tuple[Path, Path, str]:
    """Submit a sweep of one run; return its file, the run's folder and its job."""
    sweep = write_ready_sweep(folder, data, name, steps=steps, resources=RESOURCES | resources, **ONE_RUN)
    (run,) = read_sweep(sweep).runs
    dispatch("submit", sweep)
    return sweep, run.folder, job_of(folder / name, "phantom")


@pytest.fixture(scope="module")
def undisturbed(phantom_data, tmp_path_factory):
    """The folder of the same run of STEPS steps on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sweep = write_ready_sweep(folder, phantom_data, "quiet", steps=STEPS, **ONE_RUN)
    run_without_slurm(sweep, 1)
    return read_sweep(sweep).runs[0].folder


def process_of(run: Path) -> psutil.Process:
    """Return rank 0 of the latest start of a run."""
    return psutil.Process(int(re.match(r"pid (\d+) ", read_json(run / FENCE)["holder"])[1]))


def wait_for_steps(run: Path, steps: int) -> None:
    before = last_step(run)
    until_in_slurm(lambda: last_step(run) >= before + steps)


def test_a_run_that_reaches_its_time_limit_saves_requeues_and_continues(slurm_up, phantom_data, tmp_path):
    sweep, run, job = submit(tmp_path, phantom_data, "limit", ENDLESS, signal_seconds=30)
    wait_for_steps(run, 3)
    shorten_time_limit(job)
    until(lambda: restarts(job) == 1)
    log = read_log(tmp_path / "limit", job)
    (step,) = map(int, re.findall(r"stopped by a signal at step (\d+)", log))
    assert "slurm: stopped by a signal: requeued" in log
    until_in_slurm(lambda: f"from step {step} of {ENDLESS}" in read_log(tmp_path / "limit", job))
    until_in_slurm(lambda: last_step(run) > step)
    dispatch("cancel", sweep)
    until(lambda: have_ended(job))


def shorten_time_limit(job: str) -> None:
    """Let the job end within two minutes by its time limit."""
    hours, minutes, _ = re.search(r" RunTime=(\d+):(\d+):(\d+)", slurm("scontrol", "show", "job", "-o", job)).groups()
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")


@pytest.mark.parametrize("grace", [120, 0])
def test_a_site_that_cancels_preempted_jobs(slurm_up, phantom_data, tmp_path, undisturbed, grace):
    """With a grace time the run saves and requeues itself. Without one it is lost, and `resume` continues it."""
    slurm("scontrol", "update", "PartitionName=debug", "PreemptMode=CANCEL", f"GraceTime={grace}")
    try:
        sweep, run, job = submit(tmp_path, phantom_data, "site", STEPS, cpus=4, nodelist="n1")
        wait_for_steps(run, 6)
        slurm("sbatch", "--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        if grace:
            until(lambda: restarts(job) == 1)
            assert "slurm: stopped by a signal: requeued" in read_log(tmp_path / "site", job)
        else:
            until(lambda: have_ended(job))
            status = dispatch("status", sweep, code=1)
            assert re.search(r"phantom/u-net/\S+ +failed .* preempted$", status, re.MULTILINE), status
            assert "1 failed earlier. Run `mgcc slurm resume" in dispatch("submit", sweep)
            dispatch("resume", sweep)
        until_in_slurm(lambda: have_ended(job_of(tmp_path / "site", "report")))
    finally:
        slurm("scontrol", "update", "PartitionName=debug", "PreemptMode=REQUEUE", "GraceTime=120")
    assert "2 tasks: 2 done" in dispatch("status", sweep)
    assert_same_run(run, undisturbed)


def test_a_node_taken_for_dead_writes_no_more_once_its_job_has_restarted_elsewhere(
    slurm_up, phantom_data, tmp_path, undisturbed
):
    _, run, job = submit(tmp_path, phantom_data, "dead", STEPS, nodelist="n1")
    wait_for_steps(run, 6)
    earlier = process_of(run)
    earlier.send_signal(signal.SIGSTOP)  # a frozen node, which wakes up when the other one has trained
    with stopped(slurm_up, "slurmd-n1", kill=True):
        slurm("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
        until(lambda: restarts(job) == 1)
        slurm("scontrol", "update", f"JobId={job}", "ReqNodeList=n2")
        before = last_step(run)
        until_in_slurm(lambda: last_step(run) > before + 10)
        assert read_json(run / FENCE)["number"] == 2
        earlier.send_signal(signal.SIGCONT)
        until_in_slurm(lambda: have_ended(job_of(tmp_path / "dead", "report")))
        earlier.wait(120)
    slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
    log = read_log(tmp_path / "dead", job)
    assert "taken over from an earlier start of this job" in log
    assert f"{run}: was taken over by pid " in log
    assert restarts(job) == 1
    assert_same_run(run, undisturbed)


def test_a_sweep_goes_through_a_restart_of_slurmctld(slurm_up, phantom_data, tmp_path, undisturbed):
    sweep, run, job = submit(tmp_path, phantom_data, "restart", STEPS)
    wait_for_steps(run, 6)
    with stopped(slurm_up, "slurmctld"):
        for command in ("status", "submit"):
            output = dispatch(command, sweep, code=2)
            assert "Unable to contact slurm controller" in output
            assert len(output.splitlines()) == 1, output
        process_of(run).kill()
        time.sleep(5)  # in which the batch script asks slurmctld in vain
        assert "requeued" not in read_log(tmp_path / "restart", job)
    until_in_slurm(lambda: restarts(job) == 1)
    until_in_slurm(lambda: have_ended(job_of(tmp_path / "restart", "report")))
    assert "2 tasks: 2 done" in dispatch("status", sweep)
    assert_same_run(run, undisturbed)


def test_jobs_are_submitted_run_and_requeued_while_accounting_is_down(slurm_up, phantom_data, tmp_path, undisturbed):
    with stopped(slurm_up, "slurmdbd"):
        sweep, run, job = submit(tmp_path, phantom_data, "accounting", STEPS)
        wait_for_steps(run, 6)
        process_of(run).kill()
        until_in_slurm(lambda: restarts(job) == 1)
        assert dispatch("status", sweep)
        until_in_slurm(lambda: have_ended(job_of(tmp_path / "accounting", "report")))
        assert "2 tasks: 2 done" in dispatch("status", sweep)
        (run / "result.json").rename(run / "result")
        status = dispatch("status", sweep, code=1)
        assert "slurm: sacct does not answer (Problem talking to the database: Connection refused), so how" in status
    (run / "result").rename(run / "result.json")
    assert_same_run(run, undisturbed)
