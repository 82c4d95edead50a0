"""Checkpoints that are whole or absent: saved into a scratch folder by all ranks, synced, then renamed.

`checkpoints/step-00001200/` holds what Accelerate's `save_state` writes (weights as safetensors, optimizer, one
random state per rank), `ema.safetensors`, and `state.json`: the step, the place in the sample streams, the best
score so far. The weights of two further files are for use, not for resuming: `best/` and `last/model.safetensors`.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgcc_dist.data.loader import Position
from mgcc_dist.errors import UserError
from mgcc_dist.files import read_json, replacing, write_json
from mgcc_dist.train.ema import Ema

HEADER = "mgcc_dist"  # one key, because safetensors writes several in no fixed order
_SCRATCH = ".saving"
_DOOMED = ".deleting-"


@dataclass
class TrainState:
    """What a run must remember besides weights, optimizer and EMA."""

    step: int = 0
    """optimizer steps done"""
    position: Position = field(default_factory=Position)
    """samples consumed of each stream, by all ranks together"""
    best: dict[str, float] = field(default_factory=dict)
    """validation row of the best step so far, empty before the first validation"""
    loss_sums: list[dict[str, float]] = field(default_factory=list)
    """per rank: sums of the losses since the last logged row, so that a resumed row equals the uninterrupted one"""
    loss_count: int = 0
    """micro-steps in those sums"""
    seconds: float = 0.0
    """wall time of training so far, over all starts"""


def save(folder: Path, state: TrainState, ema: Ema | None, accelerator: Accelerator, keep: int) -> None:
    """Save a checkpoint and delete all but the newest `keep`. Collective: all ranks call it."""
    final = _path(folder, state.step)
    if final.is_dir():
        return
    scratch = final.parent / _SCRATCH
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch))
    if accelerator.is_main_process:
        if ema:
            save_weights(ema.module.state_dict(), scratch / "ema.safetensors")
        facts = {
            "world_size": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "ema_updates": ema.updates if ema else 0,
        }
        write_json(scratch / "state.json", asdict(state) | facts)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync(scratch)
        scratch.rename(final)
        _prune(final.parent, keep)
    accelerator.wait_for_everyone()


def restore(folder: Path, ema: Ema | None, accelerator: Accelerator) -> TrainState:
    """Load the newest checkpoint into the prepared model, optimizer and `ema`; a fresh state if there is none.

    Raises:
        UserError: the checkpoint does not load, or was sharded by DeepSpeed over another number of ranks.
    """
    newest = _whole(folder / "checkpoints")[-1:]
    if not newest:
        return TrainState()
    path = newest[0]
    try:
        saved = read_json(path / "state.json")
        sharded = DistributedType.DEEPSPEED.value in (saved["distributed_type"], accelerator.distributed_type.value)
        before, now = saved.pop("world_size"), accelerator.num_processes
        if sharded and (before != now or saved["distributed_type"] != accelerator.distributed_type.value):
            raise UserError(f"{path} was saved by DeepSpeed on {before} ranks and can't be read by {now}; use {before}")
        accelerator.load_state(str(path))
        if ema:
            ema.module.load_state_dict(load_file(path / "ema.safetensors"))
            ema.updates = saved["ema_updates"]
        del saved["distributed_type"], saved["ema_updates"]
        return TrainState(**saved | {"position": Position(**saved["position"])})
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} does not load ({error}); delete it to go on from the one before") from error


def save_weights(weights: dict[str, Tensor], path: Path, header: dict[str, Any] | None = None) -> None:
    """Write a state dict as safetensors, by rename; `header` goes, as JSON, under HEADER into the file's metadata."""
    with replacing(path) as scratch:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        save_file(tensors, scratch, metadata={HEADER: json.dumps(header)} if header else None)


def _path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _whole(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step-*"))


def _prune(checkpoints: Path, keep: int) -> None:
    """Delete the oldest; each is renamed first, so that a half-deleted folder is never taken for a checkpoint."""
    for path in _whole(checkpoints)[:-keep]:
        path.rename(checkpoints / f"{_DOOMED}{path.name}")
    for path in checkpoints.glob(f"{_DOOMED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file of `folder`, and the folder itself, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
