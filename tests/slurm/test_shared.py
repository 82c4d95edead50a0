"""Runs that share a GPU: each its own process and log; one that fails leaves the others; a notice reaches all."""

import os
import re
import signal
import threading
import time

import pytest
from jobs import dispatch, job_of, last_step, notify, over, restarts, until_in_slurm
from sweep_files import write_ready_sweep, write_sweep

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep, slug
from mgcc_dist.shards import main as shards
from mgcc_dist.slurm import cluster, plan, resources, status, submit
from mgcc_dist.slurm.shared import SharedPrograms
from mgcc_dist.slurm.status import Registry
from mgcc_dist.slurm.task import Program, attempts_of

# Three programs: one ends at once, one fails at once, one trains until it is told to stop and is done when it is
# started once more.
DONE = "import sys; open(sys.argv[1], 'w').close(); print('said')"
FAILS = "import sys; print('a poisoned run', file=sys.stderr); sys.exit(3)"
TRAINS = """
import signal, sys, time
from pathlib import Path
result, was_told = Path(sys.argv[1]), Path(sys.argv[2])
def stop(number, frame):
    was_told.open("a").write(signal.Signals(number).name)
    time.sleep(0.4)  # saves itself; another signal of the kind would end it
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
if was_told.is_file():
    result.touch()
else:
    was_told.with_suffix(".ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Three programs in one task of a job of submitit's; and the ids of the notices on which it was requeued."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    programs = {}
    for name, text in (("done", DONE), ("fails", FAILS), ("trains", TRAINS)):
        (tmp_path / f"{name}.py").write_text(text)
        words = [str(tmp_path / f"{name}.py"), str(tmp_path / name / "result.json"), str(tmp_path / "told")]
        (tmp_path / name).mkdir()
        programs[name] = Program(words, tmp_path / name, tmp_path / name / "result.json", attempts=2)
    requeued = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGUSR2, lambda number, frame: requeued.append(number))
    monkeypatch.setattr(cluster, "is_this_job_running", lambda: True)
    yield SharedPrograms(programs, tmp_path), requeued
    for number, handler in before.items():
        signal.signal(number, handler)


def send_when_ready(ready, number):
    def work():
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)  # as when both Slurm and a launcher pass it on

    threading.Thread(target=work).start()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_notice_stops_each_run_once_and_a_requeue_goes_on_with_those_that_are_not_done(shared, tmp_path, number):
    task, requeued = shared
    send_when_ready(tmp_path / "told.ready", number)
    with pytest.raises(SystemExit):
        task()
    assert requeued == [signal.SIGUSR2]
    assert task.left() == [task.programs["fails"], task.programs["trains"]]
    assert (tmp_path / "told").read_text() == "SIGINT"
    assert (tmp_path / "done" / "result.json").is_file()
    assert not (tmp_path / "trains" / "result.json").is_file()
    assert attempts_of(tmp_path / "trains")["attempts"] == 0  # forgiven

    with pytest.raises(SystemExit):
        task()
    assert (tmp_path / "trains" / "result.json").is_file()
    assert requeued == [signal.SIGUSR2]
    logs = {path.name: path.read_text() for path in tmp_path.glob("7_*_log.*")}
    assert logs["7_done_log.out"] == "said\n"  # started once
    assert "a poisoned run" in logs["7_fails_log.err"]
    assert len(logs) == 6


def test_a_run_that_fails_again_and_again_is_left_out_and_the_others_end(shared, tmp_path, capfd):
    task, _ = shared
    (tmp_path / "told").touch()
    for _ in range(3):
        with pytest.raises(SystemExit) as exit:
            task()
        assert exit.value.code == 1
    assert (tmp_path / "trains" / "result.json").is_file()
    assert (tmp_path / "7_fails_log.err").read_text().count("a poisoned run") == 2
    assert "given up after 2 starts" in capfd.readouterr().err
    assert task.left() == []


def runs(folder, **asked):
    path = write_sweep(folder, resources={"cpus": 2, "memory_gb": 1, "runs_per_gpu": 2} | asked)
    sweep = read_sweep(path)
    return sweep, plan.tasks_of(sweep, path, {}, "")


def test_runs_are_joined_to_tasks_that_ask_for_one_gpu_and_the_cores_of_all(tmp_path):
    sweep, tasks = runs(tmp_path, gpus=1)
    jobs = plan.jobs_of(plan.shared(tasks), [], 1000, sweep.name)
    (job,) = [job for job in jobs if job.tasks[0].run]
    assert [len(task.members) for task in job.tasks] == [2, 2, 2]
    assert [part.name for task in job.tasks for part in task.parts] == [task.name for task in tasks if task.run]
    assert (job.resources.gpus, job.resources.cpus, job.resources.memory_gb) == (1, 4, 2)
    ids = {part.name: f"9_{k}" for k, task in enumerate(job.tasks) for part in task.parts}
    report = next(each for each in jobs if each.tasks[0].even_if_failed)
    assert plan.dependency(report, ids, {}) == "afterany:9"
    odd = [task for task in tasks if task.run][:3]
    assert [len(task.parts) for task in plan.shared(odd)] == [2, 1]


@pytest.mark.parametrize("asked", [{"gpus": 2}, {"nodes": 2}, {"tasks_per_node": 2}])
def test_runs_of_several_ranks_or_gpus_do_not_share(asked):
    with pytest.raises(UserError, match=r"cluster\.yaml: runs_per_gpu 3 is for runs of one rank on one GPU"):
        resources.read([("cluster.yaml", {"runs_per_gpu": 3}), ("sweep", asked)])


@pytest.mark.e2e
def test_two_runs_share_a_task_on_this_machine_and_a_poisoned_one_leaves_the_other(tmp_path, phantom_shards):
    (tmp_path / "shards").symlink_to(phantom_shards.folder)
    shards(["split", "--root", str(tmp_path / "shards"), "--out", str(tmp_path / "split.json")])
    sweep, tasks = runs(tmp_path)
    good, bad = [task for task in tasks if task.run][:2]
    bad.command.append("--loop.steps=many")
    registry = Registry(sweep.out / "jobs.json", "local")
    (joined,) = plan.shared([good, bad])
    assert submit.locally([joined], registry, parallel=1) == [bad]
    assert good.is_done
    assert registry.jobs[good.name] == registry.jobs[bad.name]
    kinds = {state.task.name: state.kind for state in status.states_of([good, bad], registry)}
    assert kinds == {good.name: "done", bad.name: "failed"}
    logs = status.logs_of(registry)[registry.jobs[bad.name]]
    assert "loop.steps" in " ".join(status.last_words(status.own(logs, bad)))
    assert "IoU" in status.own(logs, good)[0].read_text()


@pytest.mark.slurm
def test_runs_that_share_a_job_are_all_told_to_go_and_go_on_after_the_requeue(slurm_up, phantom_data, tmp_path):
    asks = {"cpus": 1, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}, "runs_per_gpu": 2}
    path = write_ready_sweep(tmp_path, phantom_data, "shared", steps=150, seeds=[1], resources=asks)
    dispatch("submit", path)
    out, folders = tmp_path / "shared", [run.folder for run in read_sweep(path).runs]
    (job,) = {job_of(out, str(folder.relative_to(out))) for folder in folders}
    until_in_slurm(lambda: any(last_step(folder) >= 3 for folder in folders))  # the other may still import torch
    notify(job, "USR2")
    until_in_slurm(lambda: over(job_of(out, "report")))
    assert restarts(job) == 1
    logs = [next((out / "jobs").glob(f"{job}_*{slug(folder.name)}_log.out")).read_text() for folder in folders]
    assert all((folder / "result.json").is_file() for folder in folders)
    stopped = [(log, step) for log in logs for step in re.findall(r"stopped by a signal at step (\d+)", log)]
    assert stopped
    assert all(f"from step {step} of 150" in log for log, step in stopped)
