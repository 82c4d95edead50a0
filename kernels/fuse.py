"""Fused forms in place of a network's modules: `fuse(model)`. Same parameters, same state_dict keys, any mode.

Which modules: those whose class is named UpConv, MSAG or ConvMixerLayer and that have its parts. Each gets a `Choice`
in its place, which owns its very submodules and decides at each call which form computes:

    "torch"   the up-convolution by phases; everything else is PyTorch in any case
    "triton"  Triton's form where it can take the input, else as "torch", with one warning that says why
    "auto"    a form only where measured.json has a row for this device, dtype, mode and shape in which it is at least
              as fast as the plain module; on a device without rows the plain module, with one warning that says so

No row has been measured yet. Deepcopies, DDP, converted SyncBN, autocast and torch.compile (without
a break of its graph) see an ordinary module.
"""

import json
import platform
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mgcc_dist.kernels import upconv

Kernels = Literal["auto", "torch", "triton"]

TABLE = Path(__file__).parent / "measured.json"
CPU = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

# Operation and submodules by the class of the plain module.
OPERATIONS = {
    "UpConv": ("upconv", {"conv", "norm"}),
    "MSAG": (
        "msag",
        {f"{part}{norm}" for part in ("pointwise", "ordinary", "dilated", "vote") for norm in ("", "_norm")},
    ),
    "ConvMixerLayer": ("convmixer", {"depthwise", "depthwise_norm", "pointwise", "pointwise_norm"}),
}
# Files that are imported only where Triton's forms are wanted, as Triton may not be installed.
TRITON_FORMS = {
    "msag": ("mgcc_dist.kernels.msag", "FusedMSAG"),
    "convmixer": ("mgcc_dist.kernels.convmixer", "FusedConvMixerLayer"),
}
Row = tuple[
    str, str, str, str, tuple[int, ...]
]  # operation, form, mode, dtype, [C,H,W] of the input and C of the output
Table = dict[str, dict[Row, float]]  # device -> row -> time of the plain module / time of the form


def fuse(model: nn.Module, kernels: Kernels = "auto", table: Path = TABLE) -> nn.Module:
    """`model`, with a `Choice` in place of each module that has a fused form; `model` itself may be one."""
    policy = _Policy(kernels, read_table(table) if kernels == "auto" else {})
    if isinstance(model, Choice) or operation_of(model):
        return _replacement(model, policy)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Choice) or operation_of(child):
                setattr(parent, name, _replacement(child, policy))
    return model


def operation_of(module: nn.Module) -> str | None:
    """The operation that `module` is by its class's name and its parts; None for any other module."""
    operation, parts = OPERATIONS.get(type(module).__name__, ("", set()))
    return operation if operation and parts == {name for name, _ in module.named_children()} else None


def read_table(path: Path) -> Table:
    """The rows of `path`; of rows that differ in the batch alone the least ratio counts."""
    table: Table = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []:
        key = row["op"], row["form"], row["mode"], row["dtype"], tuple(row["shape"])
        of_device = table.setdefault(row["device"], {})
        of_device[key] = min(row["ratio"], of_device.get(key, row["ratio"]))
    return table


def device_name(device: torch.device) -> str:
    """As the table names it: a GPU by its name, a CPU by its vector instructions."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else CPU if device.type == "cpu" else device.type


class _Policy:
    """What `fuse` was asked for; one for all modules of a model, so that nothing is said twice."""

    def __init__(self, kernels: Kernels, table: Table) -> None:
        self.kernels = kernels
        self.table = table
        self.said: set[str] = set()

    def say(self, what: str) -> None:
        if not torch.compiler.is_compiling() and what not in self.said:
            self.said.add(what)
            warnings.warn(f"kernels {self.kernels}: {what}", stacklevel=2)


class Choice(nn.Module):
    """A module of the network (`plain`) and its fused forms over the same submodules."""

    def __init__(self, plain: nn.Module, operation: str, policy: _Policy) -> None:
        super().__init__()
        self.operation, self.policy = operation, policy
        # In a dict, and so not submodules: their parameters are this module's, and have its names in state dicts.
        self.forms = {"plain": plain}
        self._modules = plain._modules
        self.training = plain.training
        self.refusals: dict[str, Callable[[nn.Module, Tensor], str | None]] = {}
        if operation == "upconv":
            self._add("torch", upconv.FusedUpConv.from_module(plain), upconv.supported)
        wants_triton = policy.kernels == "triton" or any(
            (row[0], row[1]) == (operation, "triton") and ratio >= 1
            for rows in policy.table.values()
            for row, ratio in rows.items()
        )
        file = TRITON_FORMS[operation][0] if operation in TRITON_FORMS else upconv.__name__
        if wants_triton and find_spec("triton") and find_spec(file):
            self._add("triton", *_triton_form(operation, plain))

    def _add(self, form: str, module: nn.Module, refusal: Callable[[nn.Module, Tensor], str | None]) -> None:
        module._modules = self._modules  # one dict, so that a part that is replaced later is so in every form
        self.forms[form], self.refusals[form] = module, refusal

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.forms.values():
            module.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.forms[self.form_for(x)](x)

    def form_for(self, x: Tensor) -> str:
        """The form that computes x: "plain", "torch" or "triton"."""
        if self.policy.kernels == "auto":
            return self._measured_form(x)
        if self.policy.kernels == "triton" and "triton" not in self.forms:
            missing = "no form of it here" if find_spec("triton") else "Triton is not installed"
            self.policy.say(f"{self.operation} runs in PyTorch: {missing}")
        for form in ("triton", "torch"):
            if form in self.forms:
                reason = self.refusals[form](self.forms["plain"], x)
                if reason is None:
                    return form
                self.policy.say(f"{self.operation} runs in PyTorch: {reason}")
        return "plain"

    def _measured_form(self, x: Tensor) -> str:
        device = device_name(x.device)
        rows = self.policy.table.get(device)
        if rows is None:
            self.policy.say(f"nothing was measured on {device}, so PyTorch runs")
            return "plain"
        key = mode_of(self), dtype_of(x), shape_of(self, x)
        best, highest = "plain", 1.0
        for form, refusal in self.refusals.items():
            ratio = rows.get((self.operation, form, *key), 0.0)
            if ratio >= highest and refusal(self.forms["plain"], x) is None:
                best, highest = form, ratio
        return best

    def extra_repr(self) -> str:
        return f"{self.operation}, kernels={self.policy.kernels}"


def mode_of(module: nn.Module) -> str:
    return "training" if module.training or torch.is_grad_enabled() else "evaluation"


def dtype_of(x: Tensor) -> str:
    """What convolutions of x compute in, such as "bfloat16"."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return str(torch.get_autocast_dtype(x.device.type) if cast else x.dtype).removeprefix("torch.")


def shape_of(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """C, H and W of the input, and what else the time depends on: the output's channels, or the kernel's size."""
    own: Any = module
    if "conv" in module._modules:
        return (*x.shape[1:], own.conv.out_channels)
    return (*x.shape[1:], own.depthwise.kernel_size[0]) if "depthwise" in module._modules else tuple(x.shape[1:])


def _replacement(module: nn.Module, policy: _Policy) -> Choice:
    plain = module.forms["plain"] if isinstance(module, Choice) else module
    operation = operation_of(plain)
    assert operation is not None
    return Choice(plain, operation, policy)


def _triton_form(operation: str, plain: nn.Module) -> tuple[nn.Module, Callable[[nn.Module, Tensor], str | None]]:
    if operation == "upconv":
        return upconv.FusedUpConv.from_module(plain, "triton"), upconv.triton_supported
    file, name = TRITON_FORMS[operation]
    kernels = import_module(file)
    return getattr(kernels, name).from_module(plain), kernels.supported
