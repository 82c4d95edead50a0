"""Process groups: join them from any launcher, fail on all ranks at once, seed each step."""

import os
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs, gather_object

from mgcc_dist.common.environment import has_bf16
from mgcc_dist.common.errors import SharedError, UserError, system_error

T = TypeVar("T")
PRECISIONS = ("no", "fp16", "bf16")
TIMEOUT = timedelta(hours=2)
"""of collectives outside training; longer than anything that one rank does while the others wait, such as verifying all
shards"""


def create_accelerator(precision: str | None = None) -> Accelerator:
    """Create the Accelerator of this process, started by plain python, torchrun, `accelerate launch` or Slurm.

    Without a GPU the backend is gloo, also under DeepSpeed. `precision`, one of PRECISIONS, overrides the launcher's
    setting; None uses that setting (under DeepSpeed, its config file's).

    Raises:
        UserError: an environment variable or a launch file has a value that is not possible.
    """
    set_distributed_environment()
    on_cpu = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    single = int(os.environ.get("WORLD_SIZE", 1)) == 1  # with a backend Accelerate would expect a process group
    backend = "gloo" if on_cpu and not single else None
    process_group = InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)
    try:
        accelerator = Accelerator(
            cpu=on_cpu and not deepspeed,
            mixed_precision=None if deepspeed else precision,
            kwargs_handlers=[process_group],
        )
    except ValueError as error:
        variables = ", ".join(name for name in sorted(os.environ) if name.startswith("ACCELERATE_"))
        if not variables:
            raise
        raise SharedError(f"{variables}: Accelerate refuses an environment variable ({error}). Correct it.") from error
    if on_cpu and not single and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _use_fsdp_on_cpu(accelerator)
    if accelerator.mixed_precision not in PRECISIONS:
        raise SharedError(
            f"the launcher's mixed_precision: expected one of {', '.join(PRECISIONS)}, got "
            f"{accelerator.mixed_precision}. Correct it in the launch file or in ACCELERATE_MIXED_PRECISION."
        )
    if deepspeed and precision:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        for kind in ("fp16", "bf16"):
            settings[kind] = {**settings.get(kind, {}), "enabled": kind == precision}
    return accelerator


def _use_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Do what Accelerate does for GPUs; on CPUs it ignores a launch file with FSDP."""
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as AcceleratorState does
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def set_distributed_environment() -> None:
    """Set torch.distributed's environment variables from Slurm's (or submitit's), one task per rank.

    No-op if a launcher already set them, or if there is one task. MASTER_ADDR is the first host of the job step,
    MASTER_PORT follows from the job id.
    """
    environment = os.environ
    if "RANK" in environment:
        return
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        world, rank = int(environment["SUBMITIT_LOCAL_NTASKS"]), int(environment["SUBMITIT_LOCAL_GLOBALID"])
        local_rank, nodes, host = rank, 1, "127.0.0.1"
        job = int(environment["SUBMITIT_LOCAL_JOB_ID"])
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # only srun sets it; a batch script is one process
        world, rank, local_rank, nodes, job = (
            int(environment[f"SLURM_{key}"])
            for key in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "STEP_NUM_NODES", "JOB_ID")
        )
        host = _first_host(environment["SLURM_STEP_NODELIST"])
    else:
        return
    if world > 1:
        environment |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(20000 + job % 10000),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world // nodes),
        }


def _first_host(nodes: str) -> str:
    """Return the name of the first node of Slurm's `n[1-2]`, or its address if the name does not resolve."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None
    host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first.group())
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", host, "-o"], capture_output=True, text=True, check=True)
    except FileNotFoundError:  # in a container; the first node runs the batch script, which starts srun
        return os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    return next(word.removeprefix("NodeAddr=") for word in shown.stdout.split() if word.startswith("NodeAddr="))


def describe(accelerator: Accelerator) -> str:
    """Return a log line about the process group: `world size 2 (MULTI_CPU), device cpu, precision no`."""
    kind = f" ({accelerator.distributed_type.value})" if accelerator.num_processes > 1 else ""
    precision = accelerator.mixed_precision
    if precision == "bf16" and not has_bf16(accelerator.device):
        precision += " (emulated, because this device has no bfloat16 instructions; `no` is many times faster)"
    return f"world size {accelerator.num_processes}{kind}, device {accelerator.device}, precision {precision}"


def release(accelerator: Accelerator) -> None:
    """Free what a training prepared, and forget its loss scale, so that another one can use the same Accelerator."""
    accelerator.free_memory()
    if accelerator.scaler is not None and (state := accelerator.scaler.state_dict()):
        accelerator.scaler.load_state_dict(state | {"scale": 2.0**16, "_growth_tracker": 0})  # torch's initial values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of any rank, or its full disk, on all ranks at the end of the context. Collective.

    So no rank waits for one that has failed. Nothing inside the context may be collective.
    """
    own_error: Exception | None = None
    try:
        yield
    except UserError as error:
        own_error = error
    except Exception as error:
        if not system_error(error):
            raise
        own_error = error
    messages = [
        message for message in gather_object([own_error and (system_error(own_error) or str(own_error))]) if message
    ]
    if messages:
        raise SharedError(messages[0]) from own_error


def gather_by_index(rows: Iterable[tuple[Any, T]]) -> list[T]:
    """Return the values in the `rows` (index, value) of all ranks, sorted by index. Collective.

    Of an index that several rows have, only the first row counts (`evaluation_batches` in data/order.py).
    """
    values: dict[Any, T] = {}
    for index, value in gather_object(list(rows)):
        values.setdefault(index, value)
    return [values[index] for index in sorted(values)]


def seed_step(seed: int, step: int, batch: int) -> None:
    """Seed torch's global generators as a pure function of (seed, step, batch), so that a resumed run draws the same.

    `batch` numbers the batches of a step over its micro-steps and ranks. Each batch draws perturbations of its own:
    with equal seeds, Dropout would drop the same elements of image i on every rank. The devices' own generators are
    used; nothing is drawn on the CPU and copied.
    """
    mixed = np.random.SeedSequence((seed, step, batch)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))
