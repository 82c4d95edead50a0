"""`--dry-run`, failing submissions and missing software, with stand-ins for Slurm's commands."""

import subprocess
import sys

import pytest
from sweep_files import write_sweep

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm.__main__ import main

SCONTROL = """
case "$*" in
    "show config") echo "MaxArraySize = 1001" ;;
    *) echo "PartitionName=debug Default=YES MaxTime=24:00:00" ;;
esac
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Replace PATH by a folder and return a function that writes a shell script into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def dry_run(sweep, capsys):
    """Return what a dry run prints, and its warnings."""
    main(["submit", str(sweep), "--dry-run"])
    output, errors = capsys.readouterr()
    return output, [line for line in errors.splitlines() if "WARNING" in line]


@pytest.mark.parametrize(
    ("scontrol", "reason"),
    [
        (None, "scontrol: command not found"),
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", "Unable to contact slurm"),
    ],
)
def test_a_dry_run_without_a_controller_shows_the_batch_scripts(tmp_path, commands, capsys, scontrol, reason):
    if scontrol:
        commands("scontrol", scontrol)
    output, (warning,) = dry_run(write_sweep(tmp_path), capsys)
    assert "were not checked" in warning
    assert reason in warning
    assert output.count("    #!/bin/bash\n") == 4
    assert "    #SBATCH --array=0-5%6\n" in output
    assert "    #SBATCH --dependency=afterok:JOB1\n" in output
    assert "    #SBATCH --dependency=afterany:JOB3\n" in output
    assert "9 tasks in 4 jobs were not submitted" in output
    assert not (tmp_path / "tiny").exists()


def test_a_dry_run_asks_slurm_whether_it_accepts_the_jobs(tmp_path, commands, capsys):
    commands("scontrol", SCONTROL)
    commands("sbatch", "exit 0")
    output, warnings = dry_run(write_sweep(tmp_path), capsys)
    assert "9 tasks in 4 jobs were not submitted" in output
    assert not warnings
    commands("sbatch", "echo 'allocation failure: no such node' >&2; exit 1")
    with pytest.raises(UserError, match=r"Slurm rejects the resources .*: no such node"):
        dry_run(write_sweep(tmp_path), capsys)
    assert not (tmp_path / "tiny").exists()


def test_no_more_tasks_are_submitted_than_the_site_allows(tmp_path, commands, capsys):
    commands("scontrol", SCONTROL)
    commands("sbatch", "exit 0")
    commands("squeue", 'for job in 1 2 3; do echo "$job|PENDING||Resources"; done')
    sweep = write_sweep(tmp_path, resources={"max_submitted": 7})
    output, (warning,) = dry_run(sweep, capsys)
    assert "4 tasks in 3 jobs were not submitted" in output  # two preparation steps and two of six runs
    assert warning.endswith("room for 4 of 9 tasks. Run the same command again when some have ended.")
    output, (warning,) = dry_run(write_sweep(tmp_path, resources={"max_submitted": 3}), capsys)
    assert "room for 0 of 9 tasks" in warning
    assert not output


def test_a_submission_that_fails_halfway_cancels_its_jobs_and_leaves_no_files(tmp_path, commands):
    commands("scontrol", SCONTROL)
    commands("srun", "exit 0")
    accept_one = f"if [ -e {tmp_path}/one ]; then echo 'QOSMaxSubmitJob' >&2; exit 1; fi; : > {tmp_path}/one"
    commands("sbatch", f'[ "$1" = --test-only ] && exit 0\n{accept_one}\necho Submitted batch job 12')
    commands("scancel", f'echo "$@" > {tmp_path}/cancelled')
    with pytest.raises(UserError, match="Slurm rejected tiny-split-2: QOSMaxSubmitJob"):
        main(["submit", str(write_sweep(tmp_path))])
    assert (tmp_path / "cancelled").read_text() == "12\n"
    assert not (tmp_path / "tiny").exists()


def test_without_submitit_one_line_names_the_extra(tmp_path):
    code = "import runpy, sys; sys.modules['submitit'] = None; runpy.run_module('mgcc_dist.slurm', run_name='__main__')"
    words = [sys.executable, "-c", code, "submit", str(write_sweep(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "slurm: submitit is not installed. Run `pip install 'mgcc-dist[slurm]'`.\n"
    assert not (tmp_path / "tiny").exists()
