"""Replace a network's modules by fused implementations: `fuse(model)`.

Parameters, state_dict keys and modes stay the same. Modules are recognised by class name (UpConv, MSAG,
ConvMixerLayer, ConvMixer) and submodules. Each is wrapped in a `KernelDispatcher` that shares its submodules and picks
an implementation on every call:

    "torch"   the up-convolution as four phase convolutions; plain PyTorch for everything else
    "triton"  the Triton kernel where it supports the input, else as "torch", with one warning that says why
    "auto"    a fused implementation only where measured.json shows it is at least as fast as the plain module for this
              device, mode, dtype, layout and shape; plain PyTorch on a device without rows, with one warning

`kernels.bench --write-table` measures the rows. A dispatcher works like any module with deepcopy, DDP, SyncBatchNorm
conversion and autocast, and compiles without graph breaks.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from mgcc_dist.kernels import TABLE_PATH, upconv
from mgcc_dist.kernels.measured import (
    Table,
    device_name,
    dtype_name,
    layout_name,
    mode_name,
    read_table,
    shape_key,
)

if TYPE_CHECKING:
    from mgcc_dist.kernels.bench.workloads import Workload
    from mgcc_dist.kernels.compile_spec import CompileSpec

Kernels = Literal["auto", "torch", "triton"]
UnsupportedReason = Callable[[nn.Module, Tensor], str | None]
"""returns why an implementation cannot replace a plain module for an input, or None if it can"""

Implementations = dict[str, tuple[nn.Module, UnsupportedReason]]
"""fused implementations of a plain module by name, each with its check"""

# Class name of the plain module -> operation and submodules.
OPERATIONS: dict[str, tuple[str, set[str]]] = {
    "UpConv": ("upconv", {"conv", "norm"}),
    "MSAG": (
        "msag",
        {f"{part}{norm}" for part in ("pointwise", "ordinary", "dilated", "vote") for norm in ("", "_norm")},
    ),
    "ConvMixerLayer": ("convmixer", {"depthwise", "depthwise_norm", "pointwise", "pointwise_norm"}),
}


class RegisteredOperation(NamedTuple):
    """An operation of a plugin; the arguments of `register` describe the fields."""

    implementations: Callable[[nn.Module], Implementations]
    workloads: "Callable[[list[torch.dtype], bool], Iterable[Workload]]"
    compile_specs: "Callable[[str], Iterable[CompileSpec]]"


REGISTERED: dict[str, RegisteredOperation] = {}
TRITON = find_spec("triton") is not None
# Modules with Triton kernels are imported on demand, because Triton is optional.
TRITON_MODULES = {"msag": "msag", "convmixer": "convmixer", "mixer": "convmixer"}


def register(
    operation: str,
    class_name: str,
    submodules: set[str],
    implementations: Callable[[nn.Module], Implementations],
    workloads: "Callable[[list[torch.dtype], bool], Iterable[Workload]]" = lambda dtypes, quick: (),
    compile_specs: "Callable[[str], Iterable[CompileSpec]]" = lambda target: (),
) -> None:
    """Add an operation of a plugin: `fuse` then replaces modules called `class_name` that have these `submodules`.

    Args:
        implementations: returns the fused implementations of such a module, by name ("triton"), each with its check.
        workloads: returns what `mgcc bench` measures, for its --dtypes and --quick.
        compile_specs: returns what `kernels.compile` compiles for an architecture of targets.py.

    Raises:
        ValueError: there is another operation, or another one for this class name.
    """
    if class_name in OPERATIONS or operation in {name for name, _ in OPERATIONS.values()} | {"mixer"}:
        raise ValueError(f"register: operation {operation!r} or class name {class_name!r} is already registered")
    OPERATIONS[class_name] = (operation, submodules)
    REGISTERED[operation] = RegisteredOperation(implementations, workloads, compile_specs)


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
    operation = operation_of(plain)
    if operation:
        return (ConvMixerDispatcher if operation == "mixer" else KernelDispatcher)(plain, operation, policy)
    for name, child in list(module.named_children()):
        setattr(module, name, _fused(child, policy))
    return module


def operation_of(module: nn.Module) -> str | None:
    """Return the operation of `module` by class name and submodules; None if it has no fused implementation."""
    if type(module).__name__ == "ConvMixer":
        return "mixer" if {operation_of(layer) for layer in module.children()} == {"convmixer"} else None
    operation, parts = OPERATIONS.get(type(module).__name__, ("", set()))
    return operation if operation and parts == {name for name, _ in module.named_children()} else None


def fused_implementations(operation: str, plain: nn.Module, triton: bool) -> Implementations:
    """Return the fused implementations of `plain` by name, each with its check.

    Names are "torch" and, with `triton` and if Triton is installed, "triton". A gate also has "triton NAME" for each
    way to compute it in evaluation; only the benchmark and "auto" use these.
    """
    found: Implementations = {}
    if operation == "upconv":
        found["torch"] = upconv.FusedUpConv.from_module(plain), upconv.unsupported_reason
    if not (triton and TRITON):
        return found
    if operation in REGISTERED:
        return REGISTERED[operation].implementations(plain)
    if operation == "upconv":
        fused_upconv = upconv.FusedUpConv.from_module(plain, "triton")
        return found | {"triton": (fused_upconv, upconv.triton_unsupported_reason)}
    kernels = import_module(f"mgcc_dist.kernels.{TRITON_MODULES[operation]}")
    if operation == "mixer":
        check = partial(_first_unsupported_reason, kernels.unsupported_reason)
        return {"triton": (kernels.FusedConvMixer.from_module(plain), check)}
    if operation == "convmixer":
        return {"triton": (kernels.FusedConvMixerLayer.from_module(plain), kernels.unsupported_reason)}
    names = {"triton": None} | {f"triton {name}": name for name in kernels.EVALUATION_IMPLEMENTATIONS}
    return {
        name: (kernels.FusedMSAG.from_module(plain, how), partial(kernels.unsupported_reason, implementation=how))
        for name, how in names.items()
    }


def _first_unsupported_reason(check: UnsupportedReason, stack: nn.Module, x: Tensor) -> str | None:
    for layer in stack.children():
        reason = check(layer, x)
        if reason is not None:
            return reason
    return None


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

    def __init__(self, plain: nn.Module, operation: str, policy: _Policy) -> None:
        super().__init__()
        self.operation, self.policy = operation, policy
        # A dict hides the implementations from nn.Module, so that parameters keep the plain module's names.
        self.implementations = {"plain": plain}
        self._modules = plain._modules
        self.training = plain.training
        self.checks: dict[str, UnsupportedReason] = {}
        use_triton = policy.kernels == "triton" or any(
            key[0] == operation and key[1].startswith("triton") and speedup >= 1
            for rows in policy.table.values()
            for key, speedup in rows.items()
        )
        for name, (module, check) in fused_implementations(operation, plain, use_triton).items():
            module._modules = self._modules  # one shared dict, so that replacing a submodule reaches all of them
            self.implementations[name], self.checks[name] = module, check

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.implementations.values():
            module.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.implementations[self.select(x)](x)

    def select(self, x: Tensor) -> str:
        """Return the name of the implementation for x: "plain" or one of `fused_implementations`."""
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
            command = "python -m mgcc_dist.kernels.bench --write-table"
            self.policy.warn_once(f"no measurements for {device}; using PyTorch. Run `{command}` to measure it.")
            return "plain"
        key = mode_name(self), dtype_name(x), layout_name(x), shape_key(self, x)
        fastest, highest = "plain", 1.0
        for name, check in self.checks.items():
            speedup = rows.get((self.operation, name, *key), 0.0)
            if speedup >= highest and check(self.implementations["plain"], x) is None:
                fastest, highest = name, speedup
        return fastest

    def extra_repr(self) -> str:
        return f"{self.operation}, kernels={self.policy.kernels}"


class ConvMixerDispatcher(KernelDispatcher):
    """The dispatcher of a ConvMixer, whose intermediate outputs decoders tap."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of every layer."""
        implementation: Any = self.implementations[self.select(x)]
        return implementation.outputs(x)
