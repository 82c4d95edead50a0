"""A training step of the real task never waits for the device between logged rows."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.data.splits import make_split, read_split, write_split
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.segmentation.task import SegmentationTask
from mgcc_dist.train.loop import fit

# Operations that read a tensor's value: on a GPU each would wait until the queue is empty.
READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal")


@pytest.fixture(scope="module")
def configured(tmp_path_factory, phantom_shards):
    split = tmp_path_factory.mktemp("waits") / "split.json"
    write_split(split, make_split(phantom_shards.records, seed=0, validation=4, labeled=8, grouped=False, name="w_1"))

    def config(method, network, *words):
        tiny = "--preset mgcc_demo --data.synthetic null --data.image_size 32 --network.widths [4,8] --data.workers 0"
        tiny += " --network.taps [1,2,3]" if network == "mgcc" else ""
        tiny += f" --data.shards {phantom_shards.folder} --data.split {split} --loop.epochs null"
        tiny += f" --loop.log_every 1000 --loop.validate_every 1000 --method.name {method} --network.name {network}"
        batches = (4, 0) if method == "supervised" else (2, 2)
        tiny += " --data.batch_labeled {} --data.batch_unlabeled {}".format(*batches)
        return parse(SegmentConfig, [*tiny.split(), *map(str, words)], CONFIGS / "segment", "mgcc_demo")

    return phantom_shards, read_split(split), config


def trained(configured, method, network, steps, out, accelerator, *words):
    shards, split, config = configured
    wanted = config(method, network, "--loop.steps", steps, *words)
    torch.manual_seed(0)
    fit(SegmentationTask(wanted, shards, split, accelerator), wanted.loop, out, accelerator)


@pytest.mark.parametrize("pair", ["supervised:unet", "uamt:unet", "cps:unet", "mgcc:mgcc", "cutmix_teacher:mgcc"])
def test_more_steps_read_no_more_values_from_the_device(configured, tmp_path, monkeypatch, pair):
    """dct is left out: it draws a rotation on the CPU that shapes its computation, which is a read of host memory."""
    calls = Counter()

    def counting(name, method):
        return lambda self, *words, **more: calls.update([name]) or method(self, *words, **more)

    for name in ("tolist", "cpu", "numpy"):  # the profiler does not see these on a CPU
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    reads = []
    for steps in (2, 5):
        calls.clear()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            trained(configured, *pair.split(":"), steps, tmp_path / str(steps), Accelerator(cpu=True))
        names = Counter(event.name for event in seen.events())
        assert names["aten::convolution"] > 0
        reads.append({name: names[name] for name in READS} | calls)
    assert reads[0] == reads[1]
    assert reads[0]["tolist"] > 0  # the last row and the scores are read


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["symmetries", "ultrasound"])
def test_a_step_on_a_gpu_never_synchronizes(configured, tmp_path, augment):
    class Strict(SegmentationTask):
        """Make waiting for the device an error from the second step to the last but one."""

        def after_step(self, progress):
            super().after_step(progress)
            torch.cuda.set_sync_debug_mode("error" if 1 <= progress.step < 5 else "default")

    shards, split, config = configured
    wanted = config("mgcc", "mgcc", "--loop.steps", 7, "--data.workers", 1, "--data.augment", augment)
    accelerator = Accelerator()
    try:
        fit(Strict(wanted, shards, split, accelerator), wanted.loop, tmp_path, accelerator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_applies_to_the_networks_and_keeps_the_names_of_weights(configured, tmp_path, monkeypatch):
    requested, compiled = [], nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, mode: (requested.append((type(self).__name__, mode)), compiled(self, backend="eager")),
    )
    words = ("--loop.compile", "reduce-overhead")
    trained(configured, "mgcc", "mgcc", 2, tmp_path / "compiled", Accelerator(cpu=True), *words)
    trained(configured, "mgcc", "mgcc", 2, tmp_path / "plain", Accelerator(cpu=True))
    assert requested == [("MGCC", "reduce-overhead")]
    files = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("compiled", "plain")]
    assert files[0] == files[1]
