"""GPU architectures that the kernels are compiled for ahead of time; other GPUs are not supported.

A block size that fits one architecture can spill registers or exceed shared memory on another. Tables in the kernel
files choose block sizes by these names, and `compile --check` compares each architecture with its ledger.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import torch

SHARED_BYTES = {
    "sm_80": 163 << 10,  # A100
    "sm_86": 99 << 10,  # RTX 3090, A6000
    "sm_89": 99 << 10,  # RTX 4090, L40S
    "sm_90": 227 << 10,  # H100, H200
    "sm_100": 227 << 10,  # B200
    "sm_120": 99 << 10,  # RTX 5090
    "gfx942": 64 << 10,  # MI300X
}
"""maximum shared memory per program"""


def supported_targets(triton_version: str) -> tuple[str, ...]:
    """Return the architectures for which this version of Triton compiles every kernel without spills."""
    # Triton 3.6 spills registers in the gates' convolutions on sm_100.
    return tuple(target for target in SHARED_BYTES if not (target == "sm_100" and triton_version.startswith("3.6.")))


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


TARGETS = supported_targets(_triton_version())
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_target(device: torch.device) -> str:
    """Return the architecture of `device`, such as "sm_90". On a CPU, the interpreter uses the sm_90 configuration."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def unsupported_device_reason(device: torch.device) -> str | None:
    """Return why the kernels cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return None if INTERPRETED else f"the device is {device.type}, but Triton kernels need a GPU"
    if device_target(device) not in TARGETS:
        return f"the GPU is {device_target(device)}, but the kernels are compiled and checked for {', '.join(TARGETS)}"
    return None
