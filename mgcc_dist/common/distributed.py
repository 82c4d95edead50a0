"""How a process joins its group, how ranks fail together, and the randomness of a step."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from mgcc_dist.common.environment import has_bf16
from mgcc_dist.common.errors import SharedError, UserError


def start(precision: str | None = None, accumulation: int = 1) -> Accelerator:
    """The Accelerator of this process, however it was started: plain python, torchrun, `accelerate launch` or Slurm.

    Without an accelerator device the group speaks gloo, under DeepSpeed too. `precision` ("no", "fp16", "bf16") wins
    over the launcher's; None takes the launcher's, under DeepSpeed that of its file.
    """
    join_scheduler()
    on_cpu = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # The timeout outlasts what one rank does alone while the others wait: checking shards, writing the last of them.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # a backend makes Accelerate look for a group
    backend = "gloo" if on_cpu and not alone else None
    group = InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=2))
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision=None if deepspeed else precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[group],
    )
    if deepspeed and precision:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        for kind in ("fp16", "bf16"):
            settings[kind] = {**settings.get(kind, {}), "enabled": kind == precision}
    return accelerator


def join_scheduler() -> None:
    """Where Slurm or submitit started one task a rank, say to torch what a launcher would have said.

    Does nothing where a launcher has spoken already, or there is one task. The first host of the step is where the
    ranks meet, at a port that follows from the job's number.
    """
    of = os.environ
    if "RANK" in of:
        return
    if of.get("SUBMITIT_EXECUTOR") == "local":
        world, rank = int(of["SUBMITIT_LOCAL_NTASKS"]), int(of["SUBMITIT_LOCAL_GLOBALID"])
        local, nodes, host, job = rank, 1, "127.0.0.1", int(of["SUBMITIT_LOCAL_JOB_ID"])
    elif int(of.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone: in a batch script there is one process
        world, rank, local = (int(of[f"SLURM_{key}"]) for key in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
        nodes, host = int(of["SLURM_STEP_NUM_NODES"]), _first_host(of["SLURM_STEP_NODELIST"])
        job = int(of["SLURM_JOB_ID"])
    else:
        return
    if world > 1:
        of |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(20000 + job % 10000),
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
        }
        of |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world // nodes)}


def _first_host(nodes: str) -> str:
    """Address of the first of Slurm's `n[1-2]`: its name, or what Slurm knows it by where the name does not resolve."""

    def scontrol(*words: str) -> list[str]:
        return subprocess.run(["scontrol", "show", *words], capture_output=True, text=True, check=True).stdout.split()

    host = scontrol("hostnames", nodes)[0]
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        shown = scontrol("node", host, "-o")
        return next(word.removeprefix("NodeAddr=") for word in shown if word.startswith("NodeAddr="))


def describe(accelerator: Accelerator) -> str:
    """One line for the log: `world size 2 (MULTI_CPU), device cpu, precision no`."""
    kind = accelerator.distributed_type.value
    precision = accelerator.mixed_precision
    if precision == "bf16" and not has_bf16(accelerator.device):
        precision += " (emulated, this device has no instructions for it: `no` is many times faster)"
    return f"world size {accelerator.num_processes} ({kind}), device {accelerator.device}, precision {precision}"


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A UserError that some rank raises in here is raised on all, once all are through. Collective.

    So nobody waits for a rank that has failed. Nothing in here may be collective.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    failed = [message for message in gather_object([str(mine) if mine else None]) if message]
    if failed:
        raise SharedError(failed[0]) from mine


def seed_step(seed: int, step: int, batch: int) -> None:
    """Seed torch's global generators as a pure function of (seed, step, batch): the same again after a resume.

    `batch` numbers the batches of a step over its micro-steps and ranks. Each draws its own perturbations, because its
    images are others; alike on all ranks, image i of every rank would lose the same elements to Dropout. The generators
    are those of the devices: nothing is drawn on the CPU and copied.
    """
    mixed = np.random.SeedSequence((seed, step, batch)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))
