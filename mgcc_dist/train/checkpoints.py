"""Checkpoints that are whole or absent: saved into a scratch folder by all ranks, synced, then renamed.

`checkpoints/step-00001200/` holds what Accelerate's `save_state` writes (weights as safetensors, optimizer, one
random state per rank), the moving average (one file, or one a rank under ZeRO), and `state.json`: the step, the place
in the sample streams, the best score so far, the network's shapes. The weights of two further files are for use, not
for resuming: `best/` and `last/model.safetensors`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, replacing, write_json
from mgcc_dist.data.loader import Position
from mgcc_dist.train.ema import Ema
from mgcc_dist.train.weights import Weights, zero_stage

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
    batches: int = 0
    """of an optimizer step, over all its micro-steps and ranks; 0 before the run began"""
    seconds: float = 0.0
    """wall time of training so far, over all starts"""


def save(
    folder: Path, state: TrainState, weights: Weights, ema: Ema | None, accelerator: Accelerator, keep: int
) -> None:
    """Save a checkpoint and delete all but the newest `keep`. Collective: all ranks call it.

    Raises:
        UserError: it can't be written, as on a full disk; those before it are kept.
    """
    final = _path(folder, state.step)
    if final.is_dir():
        return
    scratch = final.parent / _SCRATCH
    main = accelerator.is_main_process
    try:
        with raise_on_all_ranks(), _writing(scratch):
            if main:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
        # DeepSpeed's ranks wait for one another in here, so one that fails can only end, and its launcher the others.
        with nullcontext() if weights.sharded else raise_on_all_ranks(), _writing(scratch):
            accelerator.save_state(str(scratch))
            if ema and (main or weights.sharded):
                save_weights(_numbered(ema), scratch / _ema_file(weights, accelerator))
            if main:
                facts = {
                    "world_size": accelerator.num_processes,
                    "zero_stage": zero_stage(accelerator),
                    "ema_updates": ema.updates if ema else 0,
                    "shapes": weights.shapes,
                }
                write_json(scratch / "state.json", asdict(state) | facts)
        accelerator.wait_for_everyone()
        with raise_on_all_ranks(), _writing(scratch):
            if main:
                _sync(scratch)
                scratch.rename(final)
                _prune(final.parent, keep)
    except UserError:
        if main:
            shutil.rmtree(scratch, ignore_errors=True)  # it takes room
        raise


def restore(folder: Path, weights: Weights, ema: Ema | None, accelerator: Accelerator) -> TrainState:
    """Load the newest checkpoint into the prepared model, optimizer and `ema`; a fresh state if there is none.

    Raises:
        UserError: the checkpoint does not load, is of another network, or was sharded over other ranks.
    """
    newest = _whole(folder / "checkpoints")[-1:]
    if not newest:
        return TrainState()
    path = newest[0]
    try:
        saved = read_json(path / "state.json")
        _check_shards(path, saved.pop("zero_stage"), saved.pop("world_size"), accelerator)
        _check_shapes(folder, path, saved.pop("shapes"), weights.shapes)
        accelerator.load_state(str(path))
        accelerator.step = 0  # counts micro-steps, and a step of the other ranks may have had more or fewer of them
        updates = saved.pop("ema_updates")
        if ema:
            averages = load_file(path / _ema_file(weights, accelerator))
            for name, average in _numbered(ema).items():
                average.copy_(averages[name])
            ema.updates = updates
        return TrainState(**saved | {"position": Position(**saved["position"])})
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} does not load ({error}); delete it to go on from the one before") from error


def save_weights(weights: dict[str, Tensor], path: Path, header: dict[str, Any] | None = None) -> None:
    """Write a state dict as safetensors, by rename; `header` goes, as JSON, under HEADER into the file's metadata.

    Raises:
        UserError: the file can't be written, as on a full disk.
    """
    with _writing(path), replacing(path) as scratch:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        save_file(tensors, scratch, metadata={HEADER: json.dumps(header)} if header else None)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a UserError that says what room there is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        room = next(parent for parent in path.parents if parent.is_dir())
        raise UserError(
            f"{path} could not be written ({error}); {shutil.disk_usage(room).free:,} bytes are free in {room}. "
            "What was saved before is kept: make room, and the same command goes on from there"
        ) from error


def _numbered(ema: Ema) -> dict[str, Tensor]:
    return {str(number): average for number, average in enumerate(ema.averages)}


def _ema_file(weights: Weights, accelerator: Accelerator) -> str:
    return f"ema-{accelerator.process_index:05d}.safetensors" if weights.sharded else "ema.safetensors"


def _check_shards(path: Path, stage: int, ranks: int, accelerator: Accelerator) -> None:
    """DeepSpeed's checkpoints are one shard a rank, which only as many ranks of the same ZeRO stage can read."""
    now = zero_stage(accelerator)
    if (stage or now) and (stage, ranks) != (now, accelerator.num_processes):
        saved = f"ZeRO-{stage} on {ranks} ranks" if stage else f"no ZeRO on {ranks} ranks"
        here = f"ZeRO-{now} on {accelerator.num_processes}" if now else f"{accelerator.num_processes} without ZeRO"
        raise UserError(
            f"{path} was saved with {saved} and can't be read with {here}; start it as it was, with {ranks} ranks"
        )


def _check_shapes(folder: Path, path: Path, saved: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise UserError(
                f"{folder} holds a run of another network: {name} is {saved.get(name, 'absent')} in {path.name}, "
                f"{here.get(name, 'absent')} here; nothing was changed. Choose another --out, or that run's settings "
                "(its config.yaml)"
            )


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
