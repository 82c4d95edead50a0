"""The training loop.

One optimizer step: `accumulation` micro-steps of (batch, seed, forward, backward), clip, step, EMA. No step waits for
the device: losses are summed on it and read every `log_every` steps.

A run is a pure function of its config: batches depend on the sample offsets in the streams, randomness on (seed, step,
batch), the learning rate on the step. A run that is killed and restarted resumes from its last checkpoint and reaches
the same losses and weights, bit for bit where the arithmetic is deterministic (CPU, the same number of ranks).

A step has `ranks * accumulation` batches. A run that resumes on a different number of ranks keeps this number: fewer
ranks accumulate more. Batches, random draws and schedules are then the same, so the losses are equal up to the order of
sums.
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgcc_dist.common.components import component_keys
from mgcc_dist.common.distributed import raise_on_all_ranks, release, seed_step
from mgcc_dist.common.errors import EXIT_STOPPED, SharedError, UserError
from mgcc_dist.common.fence import check_fence
from mgcc_dist.common.signals import StopSignal
from mgcc_dist.data.loader import TrainLoader
from mgcc_dist.train import checkpoints
from mgcc_dist.train.checkpoints import TrainState
from mgcc_dist.train.config import OPTIMIZERS, LoopConfig
from mgcc_dist.train.ema import Ema
from mgcc_dist.train.fsdp import is_fsdp, register_methods, wrap_blocks
from mgcc_dist.train.heartbeat import Heartbeat
from mgcc_dist.train.launch_settings import apply_launch_settings
from mgcc_dist.train.metrics_logger import MetricsLogger
from mgcc_dist.train.profiling import StepProfiler
from mgcc_dist.train.run_folder import check_inputs, hash_inputs
from mgcc_dist.train.schedules import Progress, learning_rate_factor
from mgcc_dist.train.step_times import StepTimes
from mgcc_dist.train.trackers import check_tracker
from mgcc_dist.train.weights import Weights, meta_copy, zero_stage
from mgcc_dist.train.weights_file import save_weights

logger = logging.getLogger(__name__)


@runtime_checkable
class GroupsParameters(Protocol):
    """A module of several networks that are not trained alike, such as a generator and its discriminator."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups for the optimizer. `lr_factor` scales `loop.learning_rate`; each is clipped by its own norm."""


class Task(Protocol):
    """What to train: a module that computes its own losses, its batches, its validation."""

    name: str
    module: nn.Module
    """forward(batch, Progress) -> scalar losses by name; "loss" is minimised"""
    best_metric: str
    """validation metric that selects the best step"""
    best_is_higher: bool

    @property
    def loader(self) -> TrainLoader:
        """Training batches."""

    def after_step(self, progress: Progress) -> None:
        """Update what follows the weights, such as a mean teacher. Called after every optimizer step."""

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Return metrics of `module` (`self.module` or a copy of it), equal on all ranks. Collective.

        All ranks call `module` equally often, because a sharded one gathers its weights in each call.
        """

    def network(self, module: nn.Module) -> nn.Module:
        """Return the part of `module` whose state dict is saved in `best/` and `last/`."""

    def header(self) -> dict[str, Any]:
        """Return metadata for the headers of these files; step and metrics are added."""


def total_steps(config: LoopConfig, loader: TrainLoader, batches: int) -> int:
    """Return the number of optimizer steps of a run whose steps have `batches` batches over all ranks."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(loader.batches_for(config.epochs) / batches)


def fit(
    task: Task, config: LoopConfig, folder: Path, accelerator: Accelerator, inputs: Iterable[Path | str] = ()
) -> TrainState:
    """Train `task` in the run folder `folder`, resuming from its newest checkpoint. Collective.

    `inputs` are the files that say what data the task uses (split file, shard indexes). Their sha256 is saved in the
    checkpoints.

    Writes `metrics.jsonl`, `checkpoints/`, `best/model.safetensors`, `last/model.safetensors` and the tracker's files.

    Raises:
        UserError: the loss is not finite, a record or checkpoint can't be read, or one of `inputs` changed since the
            run started.
        SystemExit: with EXIT_STOPPED after a signal, once a checkpoint is saved.
    """
    check_tracker(config.tracker)

    # --- numerics and launcher settings
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    batches_per_step = checkpoints.saved_batches(folder) or accelerator.num_processes * config.accumulation
    accumulation = _accumulation(task, config, batches_per_step, folder, accelerator)
    apply_launch_settings(task.name, task.loader, config, accelerator, accumulation)

    # --- module, optimizer, EMA, and their state
    template = meta_copy(task.module)
    if config.compile != "no":  # only the networks: the losses around them contain a weight that changes every step
        for network in task.module.children():
            network.compile(mode=config.compile)
    fused = accelerator.device.type == "cuda" and not zero_stage(accelerator)
    optimizer = _optimizer(task.module, config, fused)
    if config.clip_norm and len(optimizer.param_groups) > 1 and zero_stage(accelerator):
        raise SharedError(
            f"{task.name}: DeepSpeed would clip the gradients of a network and its discriminator by one norm. "
            f"Set {task.name}.loop.clip_norm 0, or start without DeepSpeed."
        )
    if is_fsdp(accelerator):
        wrap_blocks(task.module, accelerator)
    module, optimizer = accelerator.prepare(task.module, optimizer)
    if is_fsdp(accelerator):
        register_methods(module)
    weights = Weights(task.module, optimizer, template, accelerator)
    ema = Ema(weights.shards, config.ema_decay) if config.ema_decay else None
    state = checkpoints.restore(folder, weights, ema, accelerator)
    with raise_on_all_ranks():
        hashes = hash_inputs(inputs)
        check_inputs(folder, state.inputs, hashes)
        state.inputs |= hashes  # data that was moved or deleted keeps its earlier path too
    state.batches = batches_per_step
    total = total_steps(config, task.loader, batches_per_step)
    warmup = config.warmup_steps or math.ceil(task.loader.batches_for(config.warmup_epochs) / batches_per_step)
    sums = _LossSums(state, accelerator)
    trained = sum(parameter.numel() for parameter in template.parameters() if parameter.requires_grad)
    length = f"from step {state.step} of {total}" if state.step else f"{total} steps"
    logger.info("%s: %s parameters, %s -> %s", task.name, f"{trained:,}", length, folder)
    profiler = StepProfiler(config.profile, folder, task.module, accelerator, name_modules=config.compile == "no")
    clock = time.monotonic() - state.seconds
    step_times = StepTimes(
        task.name, folder, task.module, template, task.loader.batch, accumulation, config.tf32, accelerator
    )

    with (
        Heartbeat(folder, state.step, config.timeout_minutes, accelerator) as heartbeat,
        StopSignal() as stop,
        closing(task.loader.batches(state.offsets)) as batches,
        MetricsLogger(task.name, folder, state.step, total, accelerator, config.tracker) as metrics,
        step_times,
    ):
        while state.step < total:
            # --- one optimizer step
            profiler.before_step(state.step + 1)
            rate = config.learning_rate * learning_rate_factor(config.schedule, state.step, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_factor", 1)
            epoch, images = task.loader.epoch_of(state.offsets), task.loader.consumed(state.offsets)
            progress = Progress(state.step, total, epoch, images, config.seed)
            for micro in range(accumulation):
                heartbeat.at(state.step, "waiting for a batch")
                with step_times.waiting_for_data():
                    batch, state.offsets = next(batches)
                heartbeat.at(state.step, "training")
                step_times.count_flops(batch, progress)
                seed_step(config.seed, state.step, micro * accelerator.num_processes + accelerator.process_index)
                if config.compile != "no":  # a second of imports
                    torch.compiler.cudagraph_mark_step_begin()  # the outputs of the previous step have been read
                with accelerator.accumulate(module):
                    losses = module(batch.to(accelerator.device), progress)
                    accelerator.backward(losses["loss"])
                    if config.clip_norm and accelerator.sync_gradients:
                        _clip(module, optimizer, config.clip_norm, accelerator)
                    optimizer.step()
                    optimizer.zero_grad()
                sums.add(losses)
            state.step += 1
            task.after_step(progress)
            if ema:
                ema.update()
            metrics.advance()
            last = state.step == total
            profiler.after_step(state.step, last)

            # --- log, validate
            epoch = task.loader.epoch_of(state.offsets)
            if state.step % config.log_every == 0 or last:
                row, by_rank = sums.mean_and_reset(step_times.per_step())
                _require_finite(task.name, state.step, row)
                seconds = round(time.monotonic() - clock, 3)
                times, stragglers = step_times.row(by_rank)
                row |= {"learning_rate": rate, **times}
                metrics.write("train", state.step, epoch, row, seconds=seconds, **stragglers)
            if last or int(epoch / config.validate_every) > int(progress.epoch / config.validate_every):
                _require_finite_weights(task.name, state.step, weights)
                heartbeat.at(state.step, "validating")
                with step_times.paused(), ema.applied() if ema else nullcontext():
                    module_to_save = weights.evaluation_module()
                    scores = _validate(task, module_to_save, accelerator)
                    metrics.write("validation", state.step, epoch, scores)
                    if _is_better(task, scores, state.best):
                        state.best = {"step": state.step, "epoch": round(epoch, 4), **scores}
                        _export(task, weights, module_to_save, folder / "best", state.best, accelerator)

            # --- checkpoint, stop
            stopped = stop.received_on_any_rank()
            if last or stopped or state.step % config.checkpoint_every == 0:
                state.seconds = time.monotonic() - clock
                sums.store(state)
                for sums_of_rank in state.loss_sums:
                    _require_finite(task.name, state.step, sums_of_rank)
                _require_finite_weights(task.name, state.step, weights)
                heartbeat.at(state.step, "saving a checkpoint")
                with step_times.paused():
                    checkpoints.save(folder, state, weights, ema, accelerator, config.keep_checkpoints)
            if stopped:
                break

    if state.step < total:
        logger.info("%s: stopped by a signal at step %d. Rerun the same command to resume.", task.name, state.step)
        raise SystemExit(EXIT_STOPPED)
    with ema.applied() if ema else nullcontext():
        _export(task, weights, weights.evaluation_module(), folder / "last", {"step": state.step}, accelerator)
    release(accelerator)
    return state


class _LossSums:
    """Sums of the losses since the last logged row, kept on the device and read only for a row or a checkpoint."""

    def __init__(self, state: TrainState, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        if not state.loss_sums:
            return
        before, now = len(state.loss_sums), accelerator.num_processes
        self._count = state.loss_count * before // now
        for name in state.loss_sums[0]:
            by_rank = [row[name] for row in state.loss_sums]
            value = by_rank[accelerator.process_index] if before == now else sum(by_rank) / now
            self._sums[name] = torch.tensor(value, device=accelerator.device)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def store(self, state: TrainState) -> None:
        """Store the sums of all ranks in `state`. Collective."""
        gathered = self._gather()
        state.loss_sums = [dict(zip(self._sums, row, strict=True)) for row in gathered] if self._sums else []
        state.loss_count = self._count

    def mean_and_reset(self, others: list[float]) -> tuple[dict[str, float], list[list[float]]]:
        """Return the mean per micro-step over all ranks, and `others` of each rank; start again at zero. Collective."""
        gathered = self._gather(others)
        means = {
            name: sum(row[column] for row in gathered) / (len(gathered) * self._count)
            for column, name in enumerate(self._sums)
        }
        rest = len(self._sums)
        self._sums, self._count = {}, 0
        return means, [row[rest:] for row in gathered]

    def _gather(self, others: Sequence[float] = ()) -> list[list[float]]:
        if not self._sums:
            return [[] for _ in range(self._accelerator.num_processes)]
        own = [*self._sums.values(), *torch.tensor(others, device=self._accelerator.device)]
        return self._accelerator.gather(torch.stack(own)[None]).tolist()


def _accumulation(task: Task, config: LoopConfig, batches: int, folder: Path, accelerator: Accelerator) -> int:
    """Return the micro-steps per optimizer step that keep the run's number of batches per step on these ranks.

    Raises:
        UserError: the batches can't be divided evenly over the ranks.
    """
    ranks = accelerator.num_processes
    accumulation, rest = divmod(batches, ranks)
    if rest:
        fitting = [str(n) for n in range(1, batches + 1) if batches % n == 0]
        raise UserError(
            f"{folder}: an optimizer step of this run has {batches} batches, which can't be divided evenly over "
            f"{ranks} ranks. Resume it on {' or '.join(fitting)}."
        )
    if accumulation != config.accumulation:
        batch = task.loader.batch
        logger.info(
            "%s: accumulating %d batches of %d per rank instead of %d, to keep the global batch size of %d on %d ranks",
            *(task.name, accumulation, batch, config.accumulation, batches * batch, ranks),
        )
    return accumulation


def _optimizer(module: nn.Module, config: LoopConfig, fused: bool) -> torch.optim.Optimizer:
    groups = module.parameter_groups() if isinstance(module, GroupsParameters) else [{"params": module.parameters()}]
    groups = [group | {"params": [each for each in group["params"] if each.requires_grad]} for group in groups]
    optimizer = OPTIMIZERS.load(config.optimizer)
    keys = component_keys(config.optimizer)
    if fused and "fused" in signature(optimizer).parameters:
        keys["fused"] = True
    return optimizer(groups, lr=config.learning_rate, **keys)


def _clip(module: nn.Module, optimizer: torch.optim.Optimizer, norm: float, accelerator: Accelerator) -> None:
    groups = optimizer.param_groups
    if len(groups) == 1:
        accelerator.clip_grad_norm_(module.parameters(), norm)
        return
    accelerator.unscale_gradients()
    for group in groups:
        nn.utils.clip_grad_norm_(group["params"], norm)


def _validate(task: Task, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    was_training = module.training
    module.eval()
    with torch.no_grad():
        scores = task.validate(module, accelerator)
    module.train(was_training)
    return scores


def _is_better(task: Task, scores: dict[str, float], best: dict[str, float]) -> bool:
    if not best:
        return True
    difference = scores[task.best_metric] - best[task.best_metric]
    return difference > 0 if task.best_is_higher else difference < 0


def _export(
    task: Task, weights: Weights, module: nn.Module, folder: Path, metrics: dict[str, float], accelerator: Accelerator
) -> None:
    state = weights.state_dict(task.network(module))
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            check_fence(folder.parent)
            save_weights(state, folder / "model.safetensors", task.header() | metrics)


def _require_finite(name: str, step: int, losses: dict[str, float]) -> None:
    """Raise SharedError unless the loss is finite. All ranks must pass the same `losses`."""
    if math.isfinite(losses["loss"]):
        return
    shown = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
    raise SharedError(
        f"{name}: the loss is not finite at step {step} ({shown}). Earlier checkpoints are kept. "
        "Try a lower loop.learning_rate, loop.clip_norm 1, or loop.precision no."
    )


def _require_finite_weights(name: str, step: int, weights: Weights) -> None:
    """Raise SharedError unless all weights are finite: a step with a finite loss can still spoil them. Collective."""
    if not weights.finite():
        _require_finite(name, step, {"loss": math.nan})
