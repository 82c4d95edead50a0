"""What competes on a workload: the plain module in each layout, its fused forms, torch.compile; and their calls."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgcc_dist.kernels.bench.workloads import LAYOUTS, Workload
from mgcc_dist.kernels.fuse import forms_of

PLAIN, COMPILE = "plain", "compile"
# Name, layout, what torch.compile is told. Inductor leaves layouts alone in training with such channels unless told to.
COMPILED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "channels_last", {}),
    ("max-autotune", "channels_last", {"mode": "max-autotune-no-cudagraphs"}),  # replay has graphs of its own
    ("forced-layout", "contiguous", {"options": {"force_layout_optimization": True}}),
)
# Far from what tests ask for: it keeps times of a wrong result out of the table.
ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Candidate:
    form: str
    """plain, compile and which, or a name of `fuse.forms_of`"""
    layout: str
    module: nn.Module

    @property
    def name(self) -> str:
        return f"{self.form} {self.layout}"


class Calls:
    """A candidate on input sets in turn, under autocast where the workload is not in float32."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], workload: Workload) -> None:
        self.module, self.inputs, self.workload = module, inputs, workload
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.upstream: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}

    def forward(self, i: int) -> Tensor:
        x = self.inputs[i]
        # As in a step each weight is cast once a call; a cache of casts would also be of no use to a CUDA graph.
        cast = torch.autocast(x.device.type, self.workload.dtype, x.dtype != torch.float32, cache_enabled=False)
        with torch.inference_mode(not self.workload.training), cast:
            return self.module(x)

    def both(self, i: int) -> tuple[Tensor, ...]:
        return self._gradients(self.forward(i), i)

    def backward(self, i: int) -> tuple[Tensor, ...]:
        if i not in self.kept:
            self.kept[i] = self.forward(i)
            for (
                part
            ) in self.module.modules():  # what is kept holds running statistics, and the next forward writes them
                part._buffers |= {name: None if b is None else b.clone() for name, b in part._buffers.items()}
        return self._gradients(self.kept[i], i, keep=True)

    def _gradients(self, y: Tensor, i: int, keep: bool = False) -> tuple[Tensor, ...]:
        if i not in self.upstream:
            generator = torch.Generator(y.device).manual_seed(i)
            drawn = torch.randn(y.shape, generator=generator, device=y.device)
            self.upstream[i] = torch.empty_like(y).copy_(drawn)
        return torch.autograd.grad(y, [self.inputs[i], *self.parameters], self.upstream[i], retain_graph=keep)


def eager_and_fused(workload: Workload, device: torch.device, triton: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The plain module and its forms in each layout; and why a form can't take this workload, by candidate."""
    candidates, refused = [], {}
    for layout, memory_format in LAYOUTS.items():
        plain: nn.Module = workload.module(device).to(memory_format=memory_format)  # type: ignore[call-overload]
        candidates.append(Candidate(PLAIN, layout, plain))
        (example,) = workload.inputs(1, layout, device)
        forms = forms_of(workload.op, plain, triton)
        named = {name for name in forms if name.startswith("triton ")}  # forms in evaluation, of which one is "triton"
        for name in forms.keys() - ({"triton"} if named and not workload.training else named):
            form, refusal = forms[name]
            with torch.set_grad_enabled(workload.training):
                reason = refusal(plain, example)
            if reason:
                refused[f"{name} {layout}"] = reason
            else:
                candidates.append(Candidate(name, layout, form))
    return candidates, refused


def compiled(workload: Workload, device: torch.device) -> list[Candidate]:
    """The plain module under torch.compile; each compiles at its first call."""
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # else backward can't be called twice, and so not timed alone
    made = []
    for name, layout, words in COMPILED:
        plain: nn.Module = workload.module(device).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        plain.compile(**words)
        made.append(Candidate(f"{COMPILE} {name}", layout, plain))
    return made


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative, of the norm."""
    right = reference.detach().double()
    return ((ours.detach().double() - right).norm() / right.norm()).item()
