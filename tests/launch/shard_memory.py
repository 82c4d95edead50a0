"""Print, as JSON, how much memory validating and exporting a sharded network adds on this rank. test_zero.py runs it.

Peaks are of the process (VmHWM of Linux), less what was in use before.
"""

import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.train.fsdp import is_fsdp, wrap_blocks
from mgcc_dist.train.weights import Weights, meta_copy, zero_stage
from mgcc_dist.train.weights_file import save_weights

LAYERS, WIDTH = 32, 1024  # 4.2 MB per layer in fp32


def memory(kind: str) -> int:
    """Return `VmRSS` (in use) or `VmHWM` (peak) of this process in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


def added(run: Callable[[], object]) -> float:
    """Return the MB that `run` adds at its peak."""
    ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, so that it is not counted as in use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    run()
    return (memory("VmHWM") - before) / 1e6


def main() -> None:
    accelerator = create_accelerator("no")
    network: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))
    template = meta_copy(network)
    optimizer = torch.optim.Adam(network.parameters())
    if zero_stage(accelerator):
        batch = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes}
        accelerator.state.deepspeed_plugin.deepspeed_config |= batch
    if is_fsdp(accelerator):
        wrap_blocks(network, accelerator)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    weights = Weights(network, optimizer, template, accelerator)
    image = torch.ones(1, WIDTH)
    accelerator.backward(prepared(image).sum())
    optimizer.step()
    optimizer.zero_grad()

    @torch.no_grad()
    def validate() -> None:
        weights.evaluation_module()(image)

    def export() -> None:
        state = weights.state_dict(weights.evaluation_module())
        if accelerator.is_main_process:
            save_weights(state, Path(folder) / "model.safetensors")

    with tempfile.TemporaryDirectory() as folder:
        added_by = {"validation": added(validate), "export": added(export)}
    added_by["network"] = sum(parameter.numel() for parameter in template.parameters()) * 4 / 1e6
    # One write per line, so that the ranks' lines don't mix.
    sys.stdout.write(json.dumps({"rank": accelerator.process_index, **added_by}) + "\n")
    sys.stdout.flush()
    accelerator.end_training()


if __name__ == "__main__":
    main()
