import math
import subprocess
import time

import pytest

pytestmark = pytest.mark.slurm


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def test_two_nodes_are_idle(slurm_up):
    assert set(output("sinfo", "-hN", "-o", "%N=%T")) == {"n1=idle", "n2=idle"}


def test_srun_reaches_both_nodes(slurm_up):
    assert sorted(output("srun", "-N2", "-n2", "printenv", "SLURMD_NODENAME")) == ["n1", "n2"]


def test_a_submitit_array_completes_and_is_accounted(slurm_up, tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_array_parallelism=4)
    jobs = executor.map_array(math.sqrt, [0, 1, 4, 9])
    assert [job.result() for job in jobs] == [0, 1, 2, 3]
    array = jobs[0].job_id.split("_")[0]
    deadline = time.monotonic() + 30  # accounting lags behind by a few seconds
    while (states := output("sacct", "-nX", "-j", array, "-o", "State")) != ["COMPLETED"] * 4:
        assert time.monotonic() < deadline, states
        time.sleep(0.5)
