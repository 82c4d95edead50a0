"""The training loop.

One optimizer step: `accumulation` micro-steps of (batch, seed, forward, backward), clip, step, EMA. Nothing in it waits
for the device: losses are summed where they are and read every `log_every` steps. A run is a pure function of its
config: batches depend on the place in the sample streams, randomness on (seed, step, batch), the learning rate on the
step. So a run that was killed and started again goes on from its last checkpoint to the same losses and weights, bit
for bit where the arithmetic itself is deterministic (CPU; the same number of ranks).

A step has `ranks * accumulation` batches, and a run keeps that number when it goes on with other ranks: fewer of them
accumulate more. The batches and what is drawn for them are then the same, so the losses are too, up to the order of
sums.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgcc_dist.common.distributed import raise_on_all_ranks, seed_step
from mgcc_dist.common.errors import EXIT_STOPPED, SharedError, UserError
from mgcc_dist.common.signals import StopSignal
from mgcc_dist.data.loader import TrainLoader
from mgcc_dist.train import checkpoints
from mgcc_dist.train.checkpoints import TrainState
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.ema import Ema
from mgcc_dist.train.metrics_logger import MetricsLogger
from mgcc_dist.train.schedules import Progress, learning_rate_factor
from mgcc_dist.train.weights import Weights, meta_copy, zero_stage


class Task(Protocol):
    """What is trained: a module that computes its own losses, its batches, its validation."""

    name: str
    module: nn.Module
    """forward(batch, Progress) -> scalar losses by name; "loss" is minimised"""
    best_metric: str
    """key of the validation row by which the best step is chosen"""
    best_is_higher: bool

    @property
    def loader(self) -> TrainLoader:
        """What `module` is trained on."""

    def after_step(self, progress: Progress) -> None:
        """Called after every optimizer step (a mean teacher's update)."""

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Scores of `module` (`self.module`, or a copy of it), equal on all ranks. Collective."""

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict that `best/` and `last/` keep."""

    def header(self) -> dict[str, Any]:
        """What their safetensors header says besides step and scores."""


def total_steps(config: LoopConfig, loader: TrainLoader) -> int:
    """Optimizer steps of the whole run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(loader.steps_for(config.epochs) / config.accumulation)


def fit(task: Task, config: LoopConfig, folder: Path, accelerator: Accelerator) -> TrainState:
    """Train `task` to its end in `folder`, going on from the newest checkpoint there.

    Leaves `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `best/model.safetensors` and `last/model.safetensors`.

    Raises:
        UserError: the loss is not finite, or a record or checkpoint can't be read.
        SystemExit: with EXIT_STOPPED, after a signal, once everything is saved.
    """
    total = total_steps(config, task.loader)
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    _tell_deepspeed(task, config, accelerator)
    template = meta_copy(task.module)
    if config.compile != "no":  # not the losses around them: the weight in them is another number at every step
        for network in task.module.children():
            network.compile(mode=config.compile)
    fused = accelerator.device.type == "cuda" and not zero_stage(accelerator)
    module, optimizer = accelerator.prepare(task.module, _optimizer(task.module, config, fused))
    weights = Weights(task.module, optimizer, template, accelerator)
    ema = Ema(weights.shards, config.ema_decay) if config.ema_decay else None
    state = checkpoints.restore(folder, weights, ema, accelerator)
    accumulation = _accumulation(task, config, state, folder, accelerator)
    sums = _LossSums(state, accelerator)
    logger = MetricsLogger(task.name, folder, state.step, total, accelerator)
    if accelerator.is_main_process:
        trained = sum(parameter.numel() for parameter in template.parameters() if parameter.requires_grad)
        start = f"from step {state.step} of {total}" if state.step else f"{total} steps"
        print(f"{task.name}: {trained:,} parameters, {start} -> {folder}", flush=True)
    batches = task.loader.batches(state.position)
    clock = time.monotonic() - state.seconds

    with StopSignal() as stop:
        while state.step < total:
            rate = config.learning_rate * learning_rate_factor(config.schedule, state.step, total, config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            progress = Progress(state.step, total, task.loader.epoch_of(state.position), config.seed)
            for micro in range(accumulation):
                batch, state.position = next(batches)
                seed_step(config.seed, state.step, micro * accelerator.num_processes + accelerator.process_index)
                torch.compiler.cudagraph_mark_step_begin()  # what a graph gave in the last step is read by now
                with accelerator.accumulate(module):
                    losses = module(batch.to(accelerator.device), progress)
                    accelerator.backward(losses["loss"])
                    if config.clip_norm and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                sums.add(losses)
            state.step += 1
            task.after_step(progress)
            if ema:
                ema.update()
            logger.advance()

            last = state.step == total
            epoch = task.loader.epoch_of(state.position)
            if state.step % config.log_every == 0 or last:
                row = sums.mean_and_reset()
                _require_finite(task.name, state.step, row)
                seconds = round(time.monotonic() - clock, 3)
                logger.write("train", state.step, epoch, row | {"learning_rate": rate}, seconds=seconds)
            if last or int(epoch / config.validate_every) > int(progress.epoch / config.validate_every):
                _require_finite_weights(task.name, state.step, weights)
                with _evaluated(weights, ema) as whole:
                    scores = _validate(task, whole, accelerator)
                    logger.write("validation", state.step, epoch, scores)
                    if _is_better(task, scores, state.best):
                        state.best = {"step": state.step, "epoch": round(epoch, 4), **scores}
                        _export(task, whole, folder / "best", state.best, accelerator)
            stopped = stop.received_on_any_rank()
            if last or stopped or state.step % config.checkpoint_every == 0:
                state.seconds = time.monotonic() - clock
                sums.remember(state)
                for row in state.loss_sums:
                    _require_finite(task.name, state.step, row)
                _require_finite_weights(task.name, state.step, weights)
                checkpoints.save(folder, state, weights, ema, accelerator, config.keep_checkpoints)
            if stopped and not last:
                logger.close()
                if accelerator.is_main_process:
                    print(f"{task.name}: stopped by a signal at step {state.step}; the same command goes on from here")
                raise SystemExit(EXIT_STOPPED)

    batches.close()
    logger.close()
    with _evaluated(weights, ema) as whole:
        _export(task, whole, folder / "last", {"step": state.step}, accelerator)
    accelerator.free_memory()
    return state


class _LossSums:
    """Sums of the losses since the last row, on the device; read only for a row or a checkpoint."""

    def __init__(self, state: TrainState, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        if not state.loss_sums:
            return
        before, now = len(state.loss_sums), accelerator.num_processes
        self._count = state.loss_count * before // now
        for name in state.loss_sums[0]:
            of_ranks = [row[name] for row in state.loss_sums]
            mine = of_ranks[accelerator.process_index] if before == now else sum(of_ranks) / now
            self._sums[name] = torch.tensor(mine, device=accelerator.device)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def remember(self, state: TrainState) -> None:
        """Put the sums of all ranks into `state`. Collective."""
        gathered = self._gather()
        state.loss_sums = [dict(zip(self._sums, row, strict=True)) for row in gathered] if self._sums else []
        state.loss_count = self._count

    def mean_and_reset(self) -> dict[str, float]:
        """Mean per micro-step over all ranks. Collective."""
        gathered = self._gather()
        means = {
            name: sum(row[column] for row in gathered) / (len(gathered) * self._count)
            for column, name in enumerate(self._sums)
        }
        self._sums, self._count = {}, 0
        return means

    def _gather(self) -> list[list[float]]:
        if not self._sums:
            return [[] for _ in range(self._accelerator.num_processes)]
        return self._accelerator.gather(torch.stack(list(self._sums.values()))[None]).tolist()


def _tell_deepspeed(task: Task, config: LoopConfig, accelerator: Accelerator) -> None:
    """Put into DeepSpeed's settings, which live as long as the process, what this task's are.

    Raises:
        UserError: an optimizer in the CPU's memory is asked for, in whose place Accelerate silently puts Adam.
    """
    if not zero_stage(accelerator):
        return
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and config.optimizer == "sgd":
        raise SharedError(
            f"{task.name}: loop.optimizer is sgd, but DeepSpeed keeps no optimizer but Adam's in the CPU's memory; "
            "take adam or adamw, or a launch file without offload"
        )
    batch = task.loader.batch_labeled + task.loader.batch_unlabeled
    settings.update(
        train_micro_batch_size_per_gpu=batch,  # asked for, since no loader is prepared
        gradient_accumulation_steps=config.accumulation,
        train_batch_size=batch * config.accumulation * accelerator.num_processes,
        gradient_clipping=config.clip_norm,  # it clips by itself, and at 1.0 if nothing is said
    )


def _accumulation(task: Task, config: LoopConfig, state: TrainState, folder: Path, accelerator: Accelerator) -> int:
    """Micro-steps of a step here, so that it has the batches that it had when the run began.

    Raises:
        UserError: they can't be divided evenly over the ranks.
    """
    ranks = accelerator.num_processes
    state.batches = state.batches or ranks * config.accumulation
    accumulation, rest = divmod(state.batches, ranks)
    if rest:
        fitting = [str(n) for n in range(1, state.batches + 1) if state.batches % n == 0]
        raise UserError(
            f"{folder}: a step of this run has {state.batches} batches, which {ranks} ranks can't divide evenly; "
            f"start it on {' or '.join(fitting)}"
        )
    if accumulation != config.accumulation:
        accelerator.gradient_accumulation_steps = accumulation
        batch = task.loader.batch_labeled + task.loader.batch_unlabeled
        accelerator.print(
            f"{task.name}: {ranks} ranks accumulate {accumulation} batches of {batch} (loop.accumulation says "
            f"{config.accumulation}), so that a step keeps the {state.batches * batch} images it had"
        )
    return accumulation


def _optimizer(module: nn.Module, config: LoopConfig, fused: bool) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=config.momentum, weight_decay=decay, fused=fused or None)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, weight_decay=decay, fused=fused or None)


@contextmanager
def _evaluated(weights: Weights, ema: Ema | None) -> Iterator[nn.Module]:
    """What is validated and exported: the whole module, with averaged weights where there are such. Collective."""
    with ema.applied() if ema else nullcontext(), weights.whole() as whole:
        yield whole


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


def _export(task: Task, module: nn.Module, folder: Path, notes: dict[str, float], accelerator: Accelerator) -> None:
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            checkpoints.save_weights(task.weights(module), folder / "model.safetensors", task.header() | notes)


def _require_finite(name: str, step: int, losses: dict[str, float]) -> None:
    """Raise SharedError unless the loss is finite; all ranks are to ask for the same `losses`."""
    if math.isfinite(losses["loss"]):
        return
    shown = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
    raise SharedError(
        f"{name}: the loss is not finite at step {step} ({shown}); what was saved before is kept. "
        "Try a lower loop.learning_rate, loop.clip_norm 1, or precision no"
    )


def _require_finite_weights(name: str, step: int, weights: Weights) -> None:
    """A last step can spoil the weights although its loss was finite."""
    if not weights.finite():
        _require_finite(name, step, {"loss": math.nan})
