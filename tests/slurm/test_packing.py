"""Runs packed on one GPU: own processes and logs, independent failures, signals to all of them."""

import os
import re
import signal
import threading
import time

import pytest
from jobs import dispatch, have_ended, job_of, last_step, read_log, restarts, send_signal, until_in_slurm
from sweep_files import write_ready_sweep, write_sweep

from mgcc_dist.common.errors import UserError
from mgcc_dist.shards import main as shards
from mgcc_dist.slurm import job_graph, resources, status, submit
from mgcc_dist.slurm.packing import PackedPrograms
from mgcc_dist.slurm.status import Registry
from mgcc_dist.slurm.worker import Program, read_attempts
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.sweep.schema import slug

# Three programs: one finishes at once, one fails at once, one runs until it is signalled and finishes at its second
# start.
DONE = "import sys; open(sys.argv[1], 'w').close(); print('done')"
FAILS = "import sys; print('run failed', file=sys.stderr); sys.exit(3)"
TRAINS = """
import signal, sys, time
from pathlib import Path
result, signalled = Path(sys.argv[1]), Path(sys.argv[2])
def stop(number, frame):
    signalled.open("a").write(signal.Signals(number).name)
    time.sleep(0.4)  # saving; another SIGINT would end it
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
if signalled.is_file():
    result.touch()
else:
    signalled.with_suffix(".ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Three programs packed in one task of a submitit job."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    programs = {}
    for name, text in (("done", DONE), ("fails", FAILS), ("trains", TRAINS)):
        (tmp_path / f"{name}.py").write_text(text)
        arguments = [str(tmp_path / f"{name}.py"), str(tmp_path / name / "result.json"), str(tmp_path / "signalled")]
        (tmp_path / name).mkdir()
        programs[name] = Program(arguments, tmp_path / name, tmp_path / name / "result.json", max_attempts=2)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    yield PackedPrograms(programs, tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)


def send_when_ready(ready, number):
    def work():
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)  # as if both Slurm and a launcher forwarded it

    threading.Thread(target=work).start()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_stops_each_run_once_and_a_requeue_resumes_the_unfinished_ones(packed, tmp_path, number):
    task = packed
    send_when_ready(tmp_path / "signalled.ready", number)
    with pytest.raises(SystemExit):
        task()
    assert task.unfinished() == [task.programs["fails"], task.programs["trains"]]
    assert (tmp_path / "signalled").read_text() == "SIGINT"
    assert (tmp_path / "done" / "result.json").is_file()
    assert not (tmp_path / "trains" / "result.json").is_file()
    attempts = read_attempts(tmp_path / "trains")
    assert (attempts["attempts"], attempts["signalled"]) == (0, True)  # a preemption does not count

    with pytest.raises(SystemExit):
        task()
    assert (tmp_path / "trains" / "result.json").is_file()
    logs = {path.name: path.read_text() for path in tmp_path.glob("7_*_log.*")}
    assert logs["7_done_log.out"] == "done\n"  # started once
    assert "run failed" in logs["7_fails_log.err"]
    assert len(logs) == 6


def test_a_run_that_keeps_failing_is_given_up_and_the_others_finish(packed, tmp_path, capfd):
    task = packed
    (tmp_path / "signalled").touch()
    for _ in range(3):
        with pytest.raises(SystemExit) as exit:
            task()
        assert exit.value.code == 1
    assert (tmp_path / "trains" / "result.json").is_file()
    assert (tmp_path / "7_fails_log.err").read_text().count("run failed") == 2
    assert "giving up after 2 attempts" in capfd.readouterr().err
    assert task.unfinished() == []


def runs(folder, **requested):
    path = write_sweep(folder, resources={"cpus": 2, "memory_gb": 1, "runs_per_gpu": 2} | requested)
    sweep = read_sweep(path)
    return sweep, job_graph.build_tasks(sweep, {}, "")


def test_runs_are_packed_into_tasks_with_one_gpu_and_the_cores_of_all_runs(tmp_path):
    sweep, tasks = runs(tmp_path, gpus=1)
    jobs = job_graph.build_jobs(job_graph.pack_runs(tasks), [], 1000, sweep.name)
    (job,) = [job for job in jobs if job.tasks[0].run]
    assert [len(task.packed) for task in job.tasks] == [2, 2, 2]
    assert [subtask.name for task in job.tasks for subtask in task.subtasks] == [
        task.name for task in tasks if task.run
    ]
    assert (job.resources.gpus, job.resources.cpus, job.resources.memory_gb) == (1, 4, 2)
    ids = {subtask.name: f"9_{k}" for k, task in enumerate(job.tasks) for subtask in task.subtasks}
    report = next(each for each in jobs if each.tasks[0].after_any)
    assert job_graph.dependency_option(report, ids, {}) == "afterany:9"
    odd = [task for task in tasks if task.run][:3]
    assert [len(task.subtasks) for task in job_graph.pack_runs(odd)] == [2, 1]


@pytest.mark.parametrize("requested", [{"gpus": 2}, {"nodes": 2}, {"tasks_per_node": 2}])
def test_runs_of_several_ranks_or_gpus_cannot_be_packed(requested):
    with pytest.raises(UserError, match=r"cluster\.yaml: runs_per_gpu 3 needs one rank and at most one GPU"):
        resources.merge_resources([("cluster.yaml", {"runs_per_gpu": 3}), ("sweep", requested)])


@pytest.mark.e2e
def test_a_failing_packed_run_on_this_machine_does_not_affect_the_other(tmp_path, phantom_shards):
    (tmp_path / "shards").symlink_to(phantom_shards.folder)
    shards(["split", "--root", str(tmp_path / "shards"), "--out", str(tmp_path / "split.json")])
    sweep, tasks = runs(tmp_path)
    good, bad = [task for task in tasks if task.run][:2]
    bad.command.append("--loop.steps=many")
    registry = Registry(sweep.out / "jobs.json", "local")
    (packed,) = job_graph.pack_runs([good, bad])
    assert submit.run_locally([packed], registry, parallel=1) == [bad]
    assert good.is_done
    assert registry.jobs[good.name] == registry.jobs[bad.name]
    states = {each.task.name: each.state for each in status.query([good, bad], registry)}
    assert states == {good.name: "done", bad.name: "failed"}
    logs = status.find_logs(registry)[registry.jobs[bad.name]]
    assert "loop.steps" in " ".join(status.final_log_lines(status.select_logs(logs, bad)))
    assert any("IoU" in path.read_text() for path in status.select_logs(logs, good))


@pytest.mark.slurm
def test_packed_runs_are_all_signalled_and_resume_after_the_requeue(slurm_up, phantom_data, tmp_path):
    requested = {"cpus": 1, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}, "runs_per_gpu": 2}
    path = write_ready_sweep(tmp_path, phantom_data, "packed", steps=60, image_size=16, seeds=[1], resources=requested)
    dispatch("submit", path)
    out, folders = tmp_path / "packed", [run.folder for run in read_sweep(path).runs]
    (job,) = {job_of(out, str(folder.relative_to(out))) for folder in folders}
    until_in_slurm(lambda: any(last_step(folder) >= 3 for folder in folders))  # the other may still import torch
    send_signal(job, "USR2")
    until_in_slurm(lambda: have_ended(job_of(out, "report")))
    assert restarts(job) == 1
    logs = [read_log(out, job, slug(str(folder.relative_to(out)))) for folder in folders]
    assert all((folder / "result.json").is_file() for folder in folders)
    stopped = [(log, step) for log in logs for step in re.findall(r"stopped by a signal at step (\d+)", log)]
    assert stopped
    assert all(f"from step {step} of 60" in log for log, step in stopped)
