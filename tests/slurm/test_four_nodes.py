"""A run over four nodes with addresses of their own, one of which loses its network."""

import subprocess

import pytest
from jobs import dispatch, have_ended, job_of, last_step, read_log, restarts, run_without_slurm, until, until_in_slurm
from same_run import assert_same_run
from sweep_files import SUPERVISED, write_ready_sweep

from mgcc_dist.common.files import read_json
from mgcc_dist.sweep.expansion import read_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

ROWS = {"U-Net": SUPERVISED | {"loop": {"timeout_minutes": 0.5}}}
RESOURCES = {"nodes": 4, "cpus": 1, "time": "0:20:00", "environment": {"OMP_NUM_THREADS": "1"}}


def test_a_run_over_four_nodes_outlives_a_cut_network(four_nodes, phantom_data, tmp_path):
    changes = {"seeds": [1], "rows": ROWS, "reference": None, "steps": 60, "resources": RESOURCES}
    sweep, quiet = (write_ready_sweep(tmp_path, phantom_data, name, **changes) for name in ("cut", "quiet"))
    run, expected = (read_sweep(path).runs[0].folder for path in (sweep, quiet))
    dispatch("submit", sweep)
    job = job_of(tmp_path / "cut", "phantom")
    until_in_slurm(lambda: last_step(run) >= 4)
    link = ["ip", "link", "set", f"{(four_nodes / 'bridge').read_text().strip()}-n3"]
    subprocess.run([*link, "down"], check=True)
    try:
        until_in_slurm(lambda: restarts(job) == 1)
    finally:
        subprocess.run([*link, "up"], check=True)
    assert "another rank did not answer in time" in read_log(tmp_path / "cut", job)
    run_without_slurm(quiet, 4)
    until_in_slurm(lambda: have_ended(job_of(tmp_path / "cut", "report")))
    assert "2 tasks: 2 done" in dispatch("status", sweep)
    assert sorted(read_json(run / "environment.json")[-1]["nodes"]) == ["n1", "n2", "n3", "n4"]
    assert_same_run(run, expected)
    until(lambda: have_ended(job))
