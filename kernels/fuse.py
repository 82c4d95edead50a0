"""Fused forms in place of a network's modules: `fuse(model)`. Same parameters, same state_dict keys, any mode.

Which modules: those whose class is named UpConv, MSAG, ConvMixerLayer or ConvMixer and that have its parts. Each gets a
`Choice` in its place, which owns its very submodules and decides at each call which form computes:

    "torch"   the up-convolution by phases; everything else is PyTorch in any case
    "triton"  Triton's form where it can take the input, else as "torch", with one warning that says why
    "auto"    a form only where measured.json has a row for this device, mode, dtype, layout and shape in which it is
              at least as fast as the plain module; on a device without rows the plain one, and one warning says so

`kernels.bench --write-table` measures the rows. Deepcopies, DDP, converted SyncBN, autocast and torch.compile (without
a break of its graph) see an ordinary module.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mgcc_dist.kernels import upconv
from mgcc_dist.kernels.measured import TABLE, Table, device_name, dtype_of, layout_of, mode_of, read_table, shape_of

Kernels = Literal["auto", "torch", "triton"]
Refusal = Callable[[nn.Module, Tensor], str | None]
"""why a form can't take the place of a plain module for an input; None if it can"""

# Operation and submodules by the class of the plain module.
OPERATIONS = {
    "UpConv": ("upconv", {"conv", "norm"}),
    "MSAG": (
        "msag",
        {f"{part}{norm}" for part in ("pointwise", "ordinary", "dilated", "vote") for norm in ("", "_norm")},
    ),
    "ConvMixerLayer": ("convmixer", {"depthwise", "depthwise_norm", "pointwise", "pointwise_norm"}),
}
TRITON = find_spec("triton") is not None
# Its forms are in files that are imported only where they are wanted, as Triton may not be installed.
TRITON_FILES = {"msag": "msag", "convmixer": "convmixer", "mixer": "convmixer"}


def fuse(model: nn.Module, kernels: Kernels = "auto", table: Path = TABLE) -> nn.Module:
    """`model`, with a `Choice` in place of each module that has a fused form; `model` itself may be one."""
    return _fused(model, _Policy(kernels, read_table(table) if kernels == "auto" else {}))


def _fused(module: nn.Module, policy: "_Policy") -> nn.Module:
    plain = module.forms["plain"] if isinstance(module, Choice) else module
    operation = operation_of(plain)
    if operation:
        return (RunChoice if operation == "mixer" else Choice)(plain, operation, policy)
    for name, child in list(module.named_children()):
        setattr(module, name, _fused(child, policy))
    return module


def operation_of(module: nn.Module) -> str | None:
    """The operation that `module` is by its class's name and its parts; None for any other module."""
    if type(module).__name__ == "ConvMixer":
        return "mixer" if {operation_of(layer) for layer in module.children()} == {"convmixer"} else None
    operation, parts = OPERATIONS.get(type(module).__name__, ("", set()))
    return operation if operation and parts == {name for name, _ in module.named_children()} else None


def forms_of(operation: str, plain: nn.Module, triton: bool) -> dict[str, tuple[nn.Module, Refusal]]:
    """What can take the place of `plain`, by name: "torch", and if asked and there "triton" and "triton ...".

    "triton" is the form that is taken where none was measured.
    """
    forms: dict[str, tuple[nn.Module, Refusal]] = {}
    if operation == "upconv":
        forms["torch"] = upconv.FusedUpConv.from_module(plain), upconv.supported
    if not (triton and TRITON):
        return forms
    if operation == "upconv":
        return forms | {"triton": (upconv.FusedUpConv.from_module(plain, "triton"), upconv.triton_supported)}
    kernels = import_module(f"mgcc_dist.kernels.{TRITON_FILES[operation]}")
    if operation == "mixer":
        return {"triton": (kernels.FusedConvMixer.from_module(plain), partial(_first_refusal, kernels.supported))}
    if operation == "convmixer":
        return {"triton": (kernels.FusedConvMixerLayer.from_module(plain), kernels.supported)}
    names = {"triton": None} | {f"triton {form}": form for form in kernels.EVALUATION_FORMS}
    return {
        name: (kernels.FusedMSAG.from_module(plain, form), partial(kernels.supported, form=form))
        for name, form in names.items()
    }


def _first_refusal(of_layer: Refusal, run: nn.Module, x: Tensor) -> str | None:
    for layer in run.children():
        reason = of_layer(layer, x)
        if reason is not None:
            return reason
    return None


def _missing(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; None if one can."""
    if not TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels need a GPU and the tensors are on {device.type}"
    return None


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
        self.refusals: dict[str, Refusal] = {}
        wants_triton = policy.kernels == "triton" or any(
            row[0] == operation and row[1].startswith("triton") and ratio >= 1
            for rows in policy.table.values()
            for row, ratio in rows.items()
        )
        for name, (form, refusal) in forms_of(operation, plain, wants_triton).items():
            form._modules = self._modules  # one dict, so that a part that is replaced later is so in every form
            self.forms[name], self.refusals[name] = form, refusal

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.forms.values():
            module.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.forms[self.form_for(x)](x)

    def form_for(self, x: Tensor) -> str:
        """The form that computes x: "plain", or one of `forms_of`."""
        if self.policy.kernels == "auto":
            return self._measured_form(x)
        missing = _missing(x.device) if self.policy.kernels == "triton" else None
        if missing:
            self.policy.say(f"{missing}, so PyTorch runs")
        for name in ("torch",) if missing else ("triton", "torch"):
            if name in self.forms:
                reason = self.refusals[name](self.forms["plain"], x)
                if reason is None:
                    return name
                self.policy.say(f"{self.operation}: {reason}, so PyTorch runs")
        return "plain"

    def _measured_form(self, x: Tensor) -> str:
        device = device_name(x.device)
        rows = self.policy.table.get(device)
        if rows is None:
            how = "python -m mgcc_dist.kernels.bench --write-table measures it"
            self.policy.say(f"nothing was measured on {device} ({how}), so PyTorch runs")
            return "plain"
        key = mode_of(self), dtype_of(x), layout_of(x), shape_of(self, x)
        best, highest = "plain", 1.0
        for form, refusal in self.refusals.items():
            ratio = rows.get((self.operation, form, *key), 0.0)
            if ratio >= highest and refusal(self.forms["plain"], x) is None:
                best, highest = form, ratio
        return best

    def extra_repr(self) -> str:
        return f"{self.operation}, kernels={self.policy.kernels}"


class RunChoice(Choice):
    """The same of a run of layers that others tap."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What comes out of every layer."""
        form: Any = self.forms[self.form_for(x)]
        return form.outputs(x)
