"""The training loop on a toy task: its steps, resuming, and a kill while it saves."""

import gzip
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from same_run import losses
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from toy import CONFIG, Toy, ToyTask, run

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import FENCE, raise_fence
from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.train import checkpoints, loop, step_times
from mgcc_dist.train.config import LoopConfig, SGDConfig
from mgcc_dist.train.loop import total_steps
from mgcc_dist.train.metrics_logger import read_rows


def test_length_in_epochs_counts_optimizer_steps():
    loader = ToyTask(batch=2).loader
    assert total_steps(LoopConfig(epochs=2), loader, batches=1) == 12
    assert total_steps(LoopConfig(epochs=2, accumulation=3), loader, batches=3) == 4
    assert total_steps(LoopConfig(steps=5), loader, batches=3) == 5
    with pytest.raises(ValueError, match=r"loop\.epochs and loop\.steps"):
        LoopConfig(epochs=1, steps=1)


def test_a_run_writes_rows_checkpoints_best_and_last(tmp_path):
    task, state = run(tmp_path)
    assert state.step == 12
    assert task.steps_seen == list(range(12))
    assert [row["step"] for row in losses(tmp_path) if row["split"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in losses(tmp_path) if row["split"] == "validation"] == [6, 12]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    assert (tmp_path / "best" / "model.safetensors").is_file()
    assert list((tmp_path / "tensorboard").iterdir())


def test_five_steps_are_traced_with_the_names_of_modules(tmp_path, monkeypatch):
    """And their FLOPs are counted: of two images, 64 products each, forward and for the gradient of the weight."""
    monkeypatch.setattr(step_times, "COUNTED_BATCH", 5)
    monkeypatch.setattr(step_times, "peak_flops", lambda name, precision, tf32: 1e6)

    class Named(Toy):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
            nn.init.ones_(self.decoder[0].weight)

        def forward(self, batch, progress):
            return super().forward(replace(batch, images=self.decoder(batch.images)), progress)

    task, _ = run(tmp_path, replace(CONFIG, profile=3), ToyTask(Named()))
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "step_3.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("decoder") == names.count("decoder.0") == 5
    assert "aten::mean" in (tmp_path / "profile" / "step_3.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step_3.json.gz", "step_3.txt"]
    trained = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert [row.get("flops_per_image") for row in trained] == [None, None, 256, 256, 256, 256]
    assert trained[-1]["mfu"] == pytest.approx(256 * trained[-1]["images_per_second"] / 1e6, rel=1e-3)
    assert trained[-1]["data_seconds"] > 0
    plain, _ = run(tmp_path / "plain", CONFIG, ToyTask(Named()))
    assert plain.module.weight == task.module.weight
    assert not (tmp_path / "plain" / "profile").exists()


def test_learning_rate_starts_at_its_peak_and_the_saved_weights_are_averaged(tmp_path):
    task, _ = run(tmp_path)
    assert losses(tmp_path)[0]["learning_rate"] == pytest.approx(0.1 * (11 / 12) ** 0.9)
    assert load_file(tmp_path / "last" / "model.safetensors")["weight"] != task.module.weight


def test_groups_of_parameters_have_their_own_rate_and_are_clipped_by_their_own_norm(tmp_path, monkeypatch):
    class TwoNetworks(Toy):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.zeros(()))

        def forward(self, batch, progress):
            return {"loss": -30 * self.weight - 40 * self.other}

        def parameter_groups(self):
            return [{"params": [self.weight]}, {"params": [self.other], "lr_factor": 0.1}]

    config = replace(CONFIG, epochs=None, steps=1, clip_norm=1.0, ema_decay=0.0, optimizer=SGDConfig(weight_decay=0))
    task, _ = run(tmp_path / "run", config, ToyTask(TwoNetworks()))
    assert (task.module.weight.item(), task.module.other.item()) == pytest.approx((0.1, 0.01))
    monkeypatch.setattr(loop, "zero_stage", lambda accelerator: 2)
    with pytest.raises(UserError, match=r"one norm\. Set toy\.loop\.clip_norm 0, or start without DeepSpeed"):
        run(tmp_path / "zero", config, ToyTask(TwoNetworks()))


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path):
    class Exact(Toy):
        def forward(self, batch, progress):
            return {"loss": (self.weight - batch.images.mean(dim=(1, 2, 3))).square().mean()}

    weights = []
    for name, accumulation, batch in (("large", 1, 6), ("accumulated", 3, 2)):
        config = replace(CONFIG, accumulation=accumulation, ema_decay=0.0)
        task, _ = run(tmp_path / name, config, ToyTask(Exact(), batch))
        weights.append(task.module.weight.item())
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resuming_from_a_checkpoint_gives_the_same_rows_and_weights(tmp_path, step):
    full, cut = tmp_path / "full", tmp_path / "cut"
    task, _ = run(full, replace(CONFIG, keep_checkpoints=9))
    shutil.copytree(full, cut)
    for checkpoint in (cut / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)
    resumed, _ = run(cut, replace(CONFIG, keep_checkpoints=9))
    assert resumed.steps_seen == list(range(step, 12))
    assert torch.equal(resumed.module.weight, task.module.weight)
    assert losses(cut) == losses(full)
    for kind in ("best", "last"):
        assert (cut / kind / "model.safetensors").read_bytes() == (full / kind / "model.safetensors").read_bytes()


def test_a_half_saved_checkpoint_is_ignored_and_deleted(tmp_path):
    scratch = tmp_path / "checkpoints" / ".saving-0"
    scratch.mkdir(parents=True)
    (scratch / "model.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert not scratch.exists()


def test_a_run_whose_folder_was_taken_over_saves_nothing_any_more(tmp_path, monkeypatch):
    """A node that was called dead comes back: the later start has the folder, its checkpoints and its weights."""
    raise_fence(tmp_path, Accelerator(cpu=True))
    sync = checkpoints._sync

    def taken_over_while_saving(scratch):
        sync(scratch)
        if read_json(scratch / "state.json")["step"] == 6:
            write_json(tmp_path / FENCE, {"number": 2, "holder": "pid 7 on n2"})

    monkeypatch.setattr(checkpoints, "_sync", taken_over_while_saving)
    with pytest.raises(UserError, match="taken over by pid 7 on n2"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert json.loads((tmp_path / FENCE).read_text())["number"] == 2
    saved_by_other = tmp_path / "checkpoints" / ".saving-2"
    saved_by_other.mkdir()
    with pytest.raises(UserError, match="taken over by pid 7 on n2"):
        run(tmp_path)
    assert saved_by_other.exists()


def test_a_damaged_checkpoint_is_named_in_the_error(tmp_path):
    run(tmp_path)
    damaged = tmp_path / "checkpoints" / "step-00000012" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match=r"step-00000012: can't be loaded .* Move it elsewhere"):
        run(tmp_path)


@pytest.mark.parametrize("log_every", [2, 100])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(tmp_path, log_every):
    with pytest.raises(UserError, match=r"loss is not finite at step .*loop\.learning_rate"):
        run(tmp_path, replace(CONFIG, log_every=log_every), ToyTask(Toy(nan_at=7)))
    assert max(int(path.name[-8:]) for path in (tmp_path / "checkpoints").glob("step-*")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda toy: toy.__init__(size=(3,)), r"another network: weight is \[\] in step-00000012, \[3\] here"),
        (lambda toy: toy.register_buffer("more", torch.ones(2)), r"more is absent in step-00000012, \[2\] here"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_and_the_difference_is_named(tmp_path, change, message):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = Toy()
    change(other)
    with pytest.raises(UserError, match=message):
        run(tmp_path, replace(CONFIG, epochs=4), ToyTask(other))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_kill_dash_nine_at_any_moment_of_saving_loses_nothing(tmp_path):
    """A process that saves after each step and is killed several times ends like one that was not killed."""
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    config = replace(CONFIG, steps=200, epochs=None, checkpoint_every=1, log_every=5)
    run(uninterrupted, config)
    options = json.dumps({"steps": 200, "epochs": None, "checkpoint_every": 1, "log_every": 5})
    program = [Path(__file__).with_name("toy.py"), killed, options]
    for delay in (0.3, 0.7, 0.45):
        logged = len(losses(killed))
        process = ranks.start(ranks.forked(1), program)
        while process.poll() is None and len(losses(killed)) == logged:
            time.sleep(0.02)
        time.sleep(delay)
        process.kill()
        process.communicate()
    ranks.finish(ranks.forked(1), program)
    assert losses(killed) == losses(uninterrupted)
    weights = [(folder / "last" / "model.safetensors").read_bytes() for folder in (killed, uninterrupted)]
    assert weights[0] == weights[1]
    state = json.loads((killed / "checkpoints" / "step-00000200" / "state.json").read_text())
    assert state["step"] == 200


def test_a_failure_of_fsdp_checkpoints_is_reported_in_one_line(tmp_path, monkeypatch):
    """It was the stack traces of all ranks, because torch's CheckpointException is no Exception."""

    def fail(*_):
        raise CheckpointException("save", {1: (OSError(28, "No space left on device"), None), 3: (KeyError(), None)})

    run(tmp_path / "complete")
    for method in ("save_state", "load_state"):
        monkeypatch.setattr(Accelerator, method, fail)
    with pytest.raises(UserError, match=r"can't be written \(\[Errno 28\] No space left on device\); [\d,]+ bytes"):
        run(tmp_path / "new")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    with pytest.raises(UserError, match=r"step-00000012: can't be loaded \(\[Errno 28\] No space left on device\)"):
        run(tmp_path / "complete")


@pytest.mark.parametrize("file", ["optimizer.bin", "state.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0: garbage\n\nmore"])
def test_a_damaged_file_of_a_checkpoint_is_reported_in_one_line(tmp_path, file, content):
    run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000012"
    (newest / file).write_bytes(content)
    with pytest.raises(
        UserError, match=r"step-00000012: can't be loaded \(.*\)\. Move it elsewhere to resume from step-00000009\.$"
    ) as raised:
        run(tmp_path)
    assert "\n" not in str(raised.value)
    newest.rename(tmp_path / "moved")
    task, state = run(tmp_path)
    assert (state.step, task.steps_seen) == (12, [9, 10, 11])
    (tmp_path / "checkpoints" / "step-00000009").rename(tmp_path / "moved-too")
    (tmp_path / "checkpoints" / "step-00000012" / file).write_bytes(content)
    with pytest.raises(UserError, match=r"Move it elsewhere to start the run again: it has no other checkpoint\.$"):
        run(tmp_path)


def test_a_missing_file_of_a_checkpoint_is_named(tmp_path):
    """Accelerate went on without the random states, and DeepSpeed named a wrong shape or raised an AssertionError."""
    run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000012" / "random_states_0.pkl").unlink()
    with pytest.raises(
        UserError, match=r"step-00000012: can't be loaded \(random_states_0\.pkl is missing\)\. Move it"
    ):
        run(tmp_path)
