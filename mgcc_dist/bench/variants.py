"""The variants of a workload that the benchmark compares: baselines and fused implementations, per memory layout.

Baselines are the plain module and torch.compile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgcc_dist.kernels.operation import LAYOUTS, Workload, specs

PLAIN, COMPILE = "plain", "compile"
# Name, layout, arguments of torch.compile. With such channels, Inductor optimises layouts in training only when forced.
COMPILED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "channels_last", {}),
    ("max-autotune", "channels_last", {"mode": "max-autotune-no-cudagraphs"}),  # the timer captures its own graphs
    ("forced-layout", "contiguous", {"options": {"force_layout_optimization": True}}),
)
# Looser than the tests: this only keeps times of wrong results out of the table.
MAX_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Variant:
    """One implementation in one memory layout."""

    implementation: str
    """"plain", "compile NAME", or a name of `OperationSpec.implementations`"""
    layout: str
    module: nn.Module

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.layout}"


class Runner:
    """Runs a module on alternating input sets, under autocast unless the workload is in float32."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], workload: Workload) -> None:
        self.module, self.inputs, self.workload = module, inputs, workload
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.grad_outputs: dict[int, Tensor] = {}
        self.saved_outputs: dict[int, Tensor] = {}

    def forward(self, i: int) -> Tensor:
        x = self.inputs[i]
        # Each weight is cast once per call, as in a training step. A CUDA graph could not use a cache of casts anyway.
        autocast = torch.autocast(x.device.type, self.workload.dtype, x.dtype != torch.float32, cache_enabled=False)
        with torch.inference_mode(not self.workload.training), autocast:
            return self.module(x)

    def both(self, i: int) -> tuple[Tensor, ...]:
        return self._gradients(self.forward(i), i)

    def backward(self, i: int) -> tuple[Tensor, ...]:
        if i not in self.saved_outputs:
            self.saved_outputs[i] = self.forward(i)
            # The saved graph references the running statistics, which the next forward modifies in place.
            for module in self.module.modules():
                module._buffers |= {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        return self._gradients(self.saved_outputs[i], i, retain_graph=True)

    def _gradients(self, y: Tensor, i: int, retain_graph: bool = False) -> tuple[Tensor, ...]:
        if i not in self.grad_outputs:
            generator = torch.Generator(y.device).manual_seed(i)
            values = torch.randn(y.shape, generator=generator, device=y.device)
            self.grad_outputs[i] = torch.empty_like(y).copy_(values)
        inputs = [self.inputs[i], *self.parameters]
        return torch.autograd.grad(y, inputs, self.grad_outputs[i], retain_graph=retain_graph)


def plain_and_fused(workload: Workload, device: torch.device, triton: bool) -> tuple[list[Variant], dict[str, str]]:
    """Return the plain and fused variants in each layout, and why unsupported ones are missing."""
    variants, unsupported = [], {}
    for layout, memory_format in LAYOUTS.items():
        plain: nn.Module = workload.module(device).to(memory_format=memory_format)  # type: ignore[call-overload]
        variants.append(Variant(PLAIN, layout, plain))
        (example,) = workload.inputs(1, layout, device)
        for name, implementation in specs()[workload.op].implementations().items():
            if (implementation.triton and not triton) or workload.mode not in implementation.benchmarked:
                continue
            with torch.set_grad_enabled(workload.training):
                reason = implementation.unsupported_reason(plain, example)
            if reason:
                unsupported[f"{name} {layout}"] = reason
            else:
                variants.append(Variant(name, layout, implementation.create(plain)))
    return variants, unsupported


def compiled_variants(workload: Workload, device: torch.device) -> list[Variant]:
    """Return the plain module under torch.compile; each compiles on its first call."""
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # allows the repeated backward that the timing of backward needs
    variants = []
    for name, layout, arguments in COMPILED:
        plain: nn.Module = workload.module(device).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        plain.compile(**arguments)
        variants.append(Variant(f"{COMPILE} {name}", layout, plain))
    return variants


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`."""
    reference = expected.detach().double()
    return ((actual.detach().double() - reference).norm() / reference.norm()).item()
