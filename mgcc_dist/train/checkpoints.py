"""Atomic checkpoints: saved into a scratch folder by all ranks, synced, then renamed.

`checkpoints/step-00001200/` holds what Accelerate's `save_state` writes (weights as safetensors, optimizer, one
random state per rank), the moving average (one file, or one per rank under ZeRO), and `state.json`: the step, the
sample offsets in the streams, the best metrics so far, the network's shapes. `best/` and `last/model.safetensors` are
for use, not for resuming.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import REFUSED, UserError, reason_of
from mgcc_dist.common.fence import check_fence, fence_number
from mgcc_dist.common.files import InvalidJson, read_json, read_object, write_json
from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.train.ema import Ema
from mgcc_dist.train.fsdp import is_fsdp
from mgcc_dist.train.saved_run import has_checkpoint, saved_checkpoints
from mgcc_dist.train.weights import Weights, zero_stage
from mgcc_dist.train.weights_file import explained, save_weights
from mgcc_dist.train.zero_resharding import load_resharded

logger = logging.getLogger(__name__)

_DAMAGE = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, AssertionError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""what loading a damaged checkpoint raises"""
_SCRATCH = ".saving-"
"""followed by the number of the start that saves, so that no two starts save into one folder (common/fence.py)"""
_DELETING = ".deleting-"


@dataclass
class TrainState:
    """State of a run besides weights, optimizer and EMA."""

    step: int = 0
    """optimizer steps done"""
    offsets: StreamOffsets = field(default_factory=StreamOffsets)
    """samples that all ranks together have consumed of each stream"""
    best: dict[str, float] = field(default_factory=dict)
    """step, epoch and validation metrics of the best step so far; empty before the first validation"""
    loss_sums: list[dict[str, float]] = field(default_factory=list)
    """per rank: sums of the losses since the last logged row, so that a resumed row equals the uninterrupted one"""
    loss_count: int = 0
    """micro-steps in those sums"""
    batches: int = 0
    """batches per optimizer step, over all micro-steps and ranks; 0 before the first start"""
    seconds: float = 0.0
    """wall time of training so far, over all starts of the run"""
    inputs: dict[str, str] = field(default_factory=dict)
    """sha256 by path of the split file and shard indexes that the run uses"""


def save(
    folder: Path, state: TrainState, weights: Weights, ema: Ema | None, accelerator: Accelerator, keep: int
) -> None:
    """Save a checkpoint and delete all but the newest `keep`. Collective.

    Raises:
        UserError: the checkpoint can't be written, for example because the disk is full; earlier ones are kept. Or
            another start of the run has taken over the folder.
    """
    final = _path(folder, state.step)
    main = accelerator.is_main_process
    with raise_on_all_ranks():
        if main:
            check_fence(folder)
    if final.is_dir():
        return
    scratch = final.parent / f"{_SCRATCH}{fence_number(folder)}"
    try:
        with raise_on_all_ranks(), explained(scratch):
            if main:
                for left in final.parent.glob(f"{_SCRATCH}*"):
                    shutil.rmtree(left, ignore_errors=True)
                scratch.mkdir(parents=True)
        # With shards, save_state is collective itself: a rank that fails in it can only exit, and its launcher ends the
        # others.
        with nullcontext() if weights.sharded else raise_on_all_ranks(), explained(scratch), _first_failure():
            accelerator.save_state(str(scratch))
            if ema and is_fsdp(accelerator):
                distributed_checkpoint.save(weights.as_distributed(ema.averages), checkpoint_id=scratch / "ema")
            elif ema and (main or weights.sharded):
                save_weights(_named(ema), scratch / _ema_file(weights, accelerator))
        accelerator.wait_for_everyone()
        with raise_on_all_ranks(), explained(scratch):
            if main:
                of_run = {
                    "world_size": accelerator.num_processes,
                    "zero_stage": zero_stage(accelerator),
                    "fsdp": is_fsdp(accelerator),
                    "ema_updates": ema.updates if ema else 0,
                    "shapes": weights.shapes,
                    "files": sorted(
                        str(file.relative_to(scratch))
                        for file in scratch.rglob("*")
                        if file.is_file() and file.suffix != ".py"  # DeepSpeed's scripts, which nothing needs
                    ),
                }
                write_json(scratch / "state.json", _as_json(state) | of_run)
                _sync(scratch)
                check_fence(folder)
                scratch.rename(final)
                _prune(final.parent, keep)
    except UserError:
        if main:
            shutil.rmtree(scratch, ignore_errors=True)  # free its space
        raise


def restore(folder: Path, weights: Weights, ema: Ema | None, accelerator: Accelerator) -> TrainState:
    """Load the newest checkpoint into the prepared model, optimizer and `ema`; return a fresh state if there is none.

    Raises:
        UserError: the checkpoint is damaged, of another network, or sharded in another way.
    """
    if not has_checkpoint(folder):
        return TrainState()
    *earlier, path = saved_checkpoints(folder)
    try:
        saved = read_json(path / "state.json")
        _check_complete(path, saved.pop("files", []))
        stage, ranks = saved.pop("zero_stage"), saved.pop("world_size")
        _check_sharding(path, _sharding(stage, saved.pop("fsdp", False)), accelerator)
        _check_shapes(folder, path, saved.pop("shapes"), weights.shapes)
        if stage and ranks != accelerator.num_processes:
            logger.info("%s: saved by %d ranks, converting it for %d", path, ranks, accelerator.num_processes)
            load_resharded(path, ema, accelerator)
        else:
            with _first_failure():
                accelerator.load_state(str(path))
                if ema:
                    _load_averages(path, ema, weights, accelerator)
        accelerator.step = 0  # Accelerate's count of micro-steps, which may differ on another number of ranks
        updates = saved.pop("ema_updates")
        if ema:
            ema.updates = updates
        offsets = StreamOffsets(**saved.pop("position"))
        return TrainState(**saved, offsets=offsets)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise
        consequence = (
            f"resume from {earlier[-1].name}" if earlier else "start the run again: it has no other checkpoint"
        )
        cause = error.__cause__ if isinstance(error, InvalidJson) else error
        raise UserError(f"{path}: can't be loaded ({reason_of(cause)}). Move it elsewhere to {consequence}.") from error


def saved_batches(folder: Path) -> int:
    """Return the batches per optimizer step of the run in `folder`; 0 if it has no checkpoint, or a damaged one."""
    try:
        return read_object(saved_checkpoints(folder)[-1] / "state.json").get("batches", 0)
    except (IndexError, UserError):  # which `restore` reports
        return 0


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the error of the first rank that failed instead of FSDP2's CheckpointException, a BaseException."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None


def _as_json(state: TrainState) -> dict[str, Any]:
    content = asdict(state)
    return content | {"position": content.pop("offsets")}  # the key in files of all versions


def _named(ema: Ema) -> dict[str, Tensor]:
    """Name the averages by their index, because safetensors needs names."""
    return {str(number): average for number, average in enumerate(ema.averages)}


def _ema_file(weights: Weights, accelerator: Accelerator) -> str:
    return f"ema-{accelerator.process_index:05d}.safetensors" if weights.sharded else "ema.safetensors"


def _load_averages(path: Path, ema: Ema, weights: Weights, accelerator: Accelerator) -> None:
    if is_fsdp(accelerator):
        distributed_checkpoint.load(weights.as_distributed(ema.averages), checkpoint_id=path / "ema")
        return
    averages = load_file(path / _ema_file(weights, accelerator))
    for name, average in _named(ema).items():
        average.copy_(averages[name])


def _check_complete(path: Path, files: list[str]) -> None:
    """Raise ValueError if a file is missing: Accelerate continues without some, and DeepSpeed names other causes."""
    if missing := [file for file in files if not (path / file).is_file()]:
        raise ValueError(f"{missing[0]} is missing" + f", and {len(missing) - 1} more" * (len(missing) > 1))


def _sharding(stage: int, fsdp: bool) -> str:
    return f"ZeRO-{stage}" if stage else "FSDP2" if fsdp else "full weights per rank"


def _check_sharding(path: Path, saved: str, accelerator: Accelerator) -> None:
    """Raise UserError if the checkpoint is sharded in another way than the weights here."""
    now = _sharding(zero_stage(accelerator), is_fsdp(accelerator))
    if saved != now:
        ranks = ", on at least two ranks" * (saved == "FSDP2" and accelerator.num_processes == 1)
        raise UserError(
            f"{path}: was saved with {saved} and can't be loaded with {now}. "
            f"Resume it with the same launch file{ranks}."
        )


def _check_shapes(folder: Path, path: Path, saved: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise UserError(
                f"{folder}: holds a run of another network: {name} is {saved.get(name, 'absent')} in {path.name}, "
                f"{here.get(name, 'absent')} here. Choose another --out, or use that run's settings (its config.yaml)."
            )


def _path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _prune(checkpoints: Path, keep: int) -> None:
    """Delete the oldest. Each is renamed first, so a half-deleted folder is never taken for a checkpoint."""
    for path in saved_checkpoints(checkpoints.parent)[:-keep]:
        path.rename(checkpoints / f"{_DELETING}{path.name}")
    for path in checkpoints.glob(f"{_DELETING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush all files of `folder`, and the folder itself, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
