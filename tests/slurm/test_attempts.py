"""When a task is not started again: the count of its starts without progress. Needs no Slurm."""

import pytest

pytest.importorskip("submitit")

from mgcc_dist.slurm.worker import read_attempts, record_attempt


@pytest.mark.parametrize(
    ("output", "progress"),
    [("run/result.json", "run/checkpoints/step-00000005"), ("search/worker_0.json", "search/trial_0003/result.json")],
)
def test_starts_are_counted_again_after_a_checkpoint_or_a_finished_trial(tmp_path, output, progress):
    folder, output = tmp_path / "task", tmp_path / output
    folder.mkdir()
    for _ in range(2):
        record_attempt(folder, output, max_attempts=2)
    (tmp_path / progress).mkdir(parents=True)
    record_attempt(folder, output, max_attempts=2)
    assert read_attempts(folder)["attempts"] == 1
    record_attempt(folder, output, max_attempts=2)
    with pytest.raises(SystemExit):
        record_attempt(folder, output, max_attempts=2)
    assert read_attempts(folder)["hopeless"]
