"""The end of the batch script, with a stand-in for scontrol. Needs no Slurm."""

import os
import subprocess

import pytest

pytest.importorskip("submitit")

from mgcc_dist.slurm.batch import requeue_lines

SCONTROL = """#!/bin/sh
echo "$@" >> calls
if [ "$(grep -c . calls)" -le ${DOWN:-0} ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
fi
case $1 in
    show) echo "JobId=12 JobState=${STATE:-RUNNING} Reason=None Requeue=1 Restarts=$RESTARTS BatchFlag=1" ;;
    requeue) if [ "$REFUSAL" ]; then echo "$REFUSAL" >&2; exit 1; fi ;;
esac
"""


def end_of_job(folder, **variables):
    """Return the calls of scontrol at the end of a job that has failed, and what it prints to stderr."""
    for name, text in (("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    script = "\n".join(["code=75", *requeue_lines("true")])
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "RESTARTS": "0", **variables}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    return (folder / "calls").read_text().splitlines(), done.stderr


def test_a_job_is_requeued_when_slurmctld_answers_again(tmp_path):
    show, requeue = "show job -o 12", "requeue 12"
    assert end_of_job(tmp_path) == ([show, show, requeue], "")
    assert end_of_job(tmp_path, DOWN="5") == ([show] * 7 + [requeue], "")


@pytest.mark.parametrize("variables", [{"STATE": "PREEMPTED"}, {"RESTARTS": "2", "SLURM_RESTART_COUNT": "1"}])
def test_a_job_that_slurm_ends_or_has_started_elsewhere_is_left_alone(tmp_path, variables):
    assert end_of_job(tmp_path, **variables) == (["show job -o 12"], "")


def test_a_site_that_allows_no_requeue_is_reported_in_the_log(tmp_path):
    calls, log = end_of_job(tmp_path, REFUSAL="Job is not requeueable", RESTARTS="1", SLURM_RESTART_COUNT="1")
    assert calls[-1] == "requeue 12"
    assert log == "slurm: not requeued: Job is not requeueable\n"
