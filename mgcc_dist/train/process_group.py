"""How a process joins its group, and the randomness of its steps."""

import os
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def start(precision: str | None = None, accumulation: int = 1) -> Accelerator:
    """The Accelerator of this process, however it was started: plain python, torchrun or `accelerate launch`.

    Without an accelerator device the group speaks gloo, under DeepSpeed too. `precision` ("no", "fp16", "bf16") wins
    over the launcher's; None takes the launcher's.
    """
    on_cpu = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # The timeout outlasts what one rank does alone while the others wait: checking shards, writing the last of them.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # a backend makes Accelerate look for a group
    backend = "gloo" if on_cpu and not alone else None
    group = InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=2))
    return Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[group],
    )


def describe(accelerator: Accelerator) -> str:
    """One line for the log: `world size 2 (MULTI_CPU), device cpu, precision no`."""
    kind = accelerator.distributed_type.value
    precision = accelerator.mixed_precision
    return f"world size {accelerator.num_processes} ({kind}), device {accelerator.device}, precision {precision}"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators as a pure function of (seed, step, rank): the same again after a resume.

    Each rank draws its own perturbations, because its images are others; alike on all ranks, image i of every rank
    would lose the same elements to Dropout. So more ranks draw otherwise than fewer, as BatchNorm too sees other
    batches there. The generators are those of the devices: nothing is drawn on the CPU and copied.
    """
    mixed = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))
