"""What a job's processes get from Slurm: CPUs, variables, logs in paths with `%`, and a limited number of starts."""

import sys
from dataclasses import replace

import pytest
from jobs import have_ended, read_log, restarts, until, until_in_slurm

from mgcc_dist.slurm import submit
from mgcc_dist.slurm.job_graph import Job, Task
from mgcc_dist.slurm.resources import Resources

pytestmark = pytest.mark.slurm

PROGRAM = """
import os
import pathlib
import subprocess

step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
print(subprocess.check_output(["scontrol", "show", "step", "-d", step], text=True))
print({key: value for key, value in os.environ.items() if key.startswith(("SLURM", "SBATCH"))})
pathlib.Path(OUT).write_text("done")
"""


def write_task(folder, **resources):
    """Return a task that prints the step's resources, and its output file."""
    output = folder / "output"
    (folder / "show_step.py").write_text(PROGRAM.replace("OUT", repr(str(output))))
    environment = {"PYTHONPATH": ":".join([str(folder), *sys.path])}
    requested = Resources(memory_gb=1, time="5", environment=environment, **resources)
    return Task("show", "show", ["-m", "show_step"], folder / "task", output, requested)


def test_every_rank_gets_its_cpus_and_scratch_and_logs_into_a_folder_with_percent_signs(slurm_up, tmp_path):
    folder = tmp_path / "10%_of 50%% %d"
    folder.mkdir()
    task = write_task(folder, cpus=2, tasks_per_node=2)
    marker = folder.parent / "marker"
    node_setup = [f"pwd > {marker}", f"echo $TMPDIR >> {marker}", "test -d $TMPDIR"]
    scratch = tmp_path / "scratch"
    task = replace(task, resources=replace(task.resources, node_setup=node_setup, scratch=str(scratch)))
    (job,) = submit.submit_job(Job("show", [task]), folder / "jobs", None)
    until(lambda: have_ended(job))
    assert task.output.is_file()
    assert marker.read_text().splitlines()[1] == f"{scratch}/mgcc-{job}"
    assert not list(scratch.iterdir())  # the job's folder is gone
    logs = [read_log(folder, job, str(rank)) for rank in range(2)]
    assert all("CPUs=4 Tasks=2" in log for log in logs), logs


def test_a_job_submitted_inside_a_job_does_not_inherit_its_options(slurm_up, tmp_path):
    task = write_task(tmp_path, cpus=3)
    outer = {"SLURM_JOB_ID": "999", "SLURM_MEM_PER_CPU": "10", "SLURM_CPU_BIND": "map_cpu:0", "SBATCH_NO_REQUEUE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in outer.items():
            patch.setenv(key, value)
        (job,) = submit.submit_job(Job("show", [task]), tmp_path / "jobs", None)
    until(lambda: have_ended(job))
    log = read_log(tmp_path, job)  # with both MEM_PER_CPU and MEM_PER_NODE srun refuses to start
    assert "CPUs=3 Tasks=1" in log, log
    assert not any(f"'{key}'" in log for key in outer if key != "SLURM_JOB_ID"), log


def test_a_job_that_dies_before_the_program_starts_is_given_up_after_its_attempts(slurm_up, tmp_path):
    task = write_task(tmp_path, cpus=1, attempts=2)
    # Ends Python in srun's step at start-up, but not in the batch script.
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'SLURM_STEP_ID' in os.environ:\n    os._exit(1)\n")
    (job,) = submit.submit_job(Job("show", [task]), tmp_path / "jobs", None)
    until_in_slurm(lambda: have_ended(job) or restarts(job) > 1)
    log = read_log(tmp_path, job)
    assert restarts(job) == 1, log
    assert "attempt 1 of 2 from step 0: requeued" in log
    assert "attempt 2 of 2 from step 0: giving up" in log
