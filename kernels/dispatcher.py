"""Replace a network's modules by fused implementations: `fuse(model)`.

Parameters, state_dict keys and modes stay the same. A module whose class is `operation.fusible`, or derives from one
that is, is wrapped in a `KernelDispatcher` that shares its submodules and picks an implementation on every call:

    "torch"   the up-convolution as four phase convolutions; plain PyTorch for everything else
    "triton"  the Triton kernel where it supports the input, else as "torch", with one warning that says why
    "auto"    a fused implementation only where measured.json shows it is at least as fast as the plain module for this
              device, mode, dtype, layout and shape; plain PyTorch on a device without rows, with one warning

`mgcc bench --write-table` measures the rows. A dispatcher works like any module with deepcopy, DDP, SyncBatchNorm
conversion and autocast, and compiles without graph breaks.
"""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from . import TABLE_PATH
from .measured import Table, device_name, dtype_name, layout_name, mode_name, read_table
from .operation import OperationSpec, UnsupportedReason, find_operation

Kernels = Literal["auto", "torch", "triton"]
TRITON = find_spec("triton") is not None


def fuse(model: nn.Module, kernels: Kernels = "auto", table: Path = TABLE_PATH) -> nn.Module:
    """Wrap each module that has a fused implementation in a dispatcher. Modifies `model` and returns it.

    A fused model can be fused again with other settings.

    Args:
        model: a network, or a single module with a fused implementation, whose dispatcher is then returned.
        kernels: "auto" uses what `table` shows to be at least as fast, "torch" PyTorch with phase up-convolutions,
            "triton" the Triton kernels where they support the input.
        table: measurements for "auto", written by `mgcc bench --write-table`.

    Raises:
        ValueError: `kernels` is none of the three.
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"fuse: unknown kernels {kernels!r}. Choose one of {', '.join(get_args(Kernels))}.")
    return _fused(model, _Policy(kernels, read_table(table) if kernels == "auto" else {}))


def _fused(module: nn.Module, policy: "_Policy") -> nn.Module:
    plain = module.implementations["plain"] if isinstance(module, KernelDispatcher) else module
    spec, problem = find_operation(plain)
    if spec and not problem:
        return spec.dispatcher()(plain, spec, policy)
    if spec:
        policy.warn_once(f"{spec.name}: {type(plain).__name__} is not fused, because {problem}; using PyTorch")
    for name, child in list(module.named_children()):
        setattr(module, name, _fused(child, policy))
    return module


def _triton_unavailable_reason(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on `device`, or None if one can."""
    if not TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a GPU and the tensors are on {device.type}"
    return None


class _Policy:
    """The arguments of `fuse`, shared by all dispatchers of a model so that each warning is given once."""

    def __init__(self, kernels: Kernels, table: Table) -> None:
        self.kernels = kernels
        self.table = table
        self.warned: set[str] = set()

    def warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self.warned:
            self.warned.add(message)
            warnings.warn(f"kernels={self.kernels}: {message}", stacklevel=2)


class KernelDispatcher(nn.Module):
    """A module of the network ("plain") and its fused implementations, all over the same submodules."""

    def __init__(self, plain: nn.Module, spec: OperationSpec, policy: _Policy) -> None:
        super().__init__()
        self.operation, self.spec, self.policy = spec.name, spec, policy
        # A dict hides the implementations from nn.Module, so that parameters keep the plain module's names.
        self.implementations = {"plain": plain}
        self._modules = plain._modules
        self.training = plain.training
        self.checks: dict[str, UnsupportedReason] = {}
        use_triton = policy.kernels == "triton" or any(
            key[0] == spec.name and key[1].startswith("triton") and speedup >= 1
            for rows in policy.table.values()
            for key, speedup in rows.items()
        )
        for name, implementation in spec.implementations().items():
            if implementation.triton and not (use_triton and TRITON):
                continue
            module = implementation.create(plain)
            module._modules = self._modules  # one shared dict, so that replacing a submodule reaches all of them
            self.implementations[name], self.checks[name] = module, implementation.unsupported_reason

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.implementations.values():
            module.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.implementations[self.select(x)](x)

    def select(self, x: Tensor) -> str:
        """Return the name of the implementation for x: "plain" or one of the spec's."""
        if self.policy.kernels == "auto":
            return self._fastest_measured(x)
        unavailable = _triton_unavailable_reason(x.device) if self.policy.kernels == "triton" else None
        if unavailable:
            self.policy.warn_once(f"{unavailable}; using PyTorch")
        for name in ("torch",) if unavailable else ("triton", "torch"):
            if name in self.implementations:
                reason = self.checks[name](self.implementations["plain"], x)
                if reason is None:
                    return name
                self.policy.warn_once(f"{self.operation}: {reason}; using PyTorch")
        return "plain"

    def _fastest_measured(self, x: Tensor) -> str:
        device = device_name(x.device)
        rows = self.policy.table.get(device)
        if rows is None:
            self.policy.warn_once(
                f"no measurements for {device}; using PyTorch. Run `mgcc bench --write-table` to measure it."
            )
            return "plain"
        shape = (*x.shape[1:], *self.spec.sizes(self.implementations["plain"]))
        key = mode_name(self), dtype_name(x), layout_name(x), shape
        fastest, highest = "plain", 1.0
        for name, check in self.checks.items():
            speedup = rows.get((self.operation, name, *key), 0.0)
            if speedup >= highest and check(self.implementations["plain"], x) is None:
                fastest, highest = name, speedup
        return fastest

    def extra_repr(self) -> str:
        return f"{self.operation}, kernels={self.policy.kernels}"
