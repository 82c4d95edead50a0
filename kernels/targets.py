"""The GPUs that the kernels are compiled for ahead of time; on any other they refuse to run.

Blocks and warps that fit one architecture spill registers, or shared memory, on another: tables in the kernel files
choose them by these names, and `compile` holds each to what its ledger says.
"""

import os

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
"""that a program may have"""
TARGETS = tuple(SHARED_BYTES)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def target_of(device: torch.device) -> str:
    """The architecture of `device`, such as "sm_90"; what the interpreter runs on a CPU are the forms of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels can't run on `device`; None if they can."""
    if device.type != "cuda":
        return None if INTERPRETED else f"device {device.type}"
    if target_of(device) not in TARGETS:
        return f"the GPU is {target_of(device)}; the kernels were compiled and checked for {', '.join(TARGETS)}"
    return None
