"""DeepSpeed's ZeRO-2 in a job of two nodes that is preempted."""

import importlib.util

import pytest
import ranks
from jobs import dispatch, have_ended, job_of, last_step, read_log, restarts, slurm, until_in_slurm
from same_run import assert_same_run
from sweep_files import write_two_node_sweep

from mgcc_dist.common.files import read_json

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ranks.REPOSITORY / "launch" / "deepspeed" / "zero2.json"),
}


def test_a_preempted_zero_2_job_ends_in_the_weights_of_an_undisturbed_one(slurm_up, phantom_data, tmp_path):
    sweep, out = write_two_node_sweep(tmp_path, phantom_data, "zero", "denoiser", ZERO_2), tmp_path / "zero"
    dispatch("submit", sweep)
    job, denoiser = job_of(out, "prepare"), out / "ldm" / "denoiser"
    until_in_slurm(lambda: last_step(denoiser) >= 3, 900)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    slurm("sbatch", *urgent)
    until_in_slurm(lambda: restarts(job) == 1)
    quiet = tmp_path / "quiet"
    config = tmp_path / "ldm.yaml"
    words = ["-m", "mgcc_dist.ldm", "--config", config, "--out", quiet, "--until", "denoiser"]
    log = ranks.finish_log(ranks.forked(2), words, **ZERO_2)
    assert "world size 2 (DEEPSPEED)" in log
    until_in_slurm(lambda: have_ended(job, job_of(out, "report")), 900)
    assert "3 tasks: 3 done" in dispatch("status", sweep)
    assert "stopped by a signal at step" in read_log(out, job)
    assert read_json(next(denoiser.glob("checkpoints/*/state.json")))["zero_stage"] == 2
    for stage in ("autoencoder", "denoiser"):
        assert_same_run(out / "ldm" / stage, quiet / stage)
