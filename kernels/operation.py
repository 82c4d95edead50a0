"""Operations: what `fuse`, `compile`, the benchmark and its table know about each.

An operation is an `OperationSpec`, registered by the `spec.py` of its folder or by a plugin. A network's module says
with `@fusible("NAME")` that it computes an operation:

    @fusible("msag")
    class MSAG(nn.Module): ...

Subclasses count too, unless they override what the kernels replace.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .compile_spec import CompileSpec

if TYPE_CHECKING:
    from .dispatcher import KernelDispatcher

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Shape = tuple[int, ...]
"""C, H, W of the input, then `OperationSpec.sizes`"""
Phase = tuple[float, float]
"""floating-point operations, bytes read and written"""
UnsupportedReason = Callable[[nn.Module, Tensor], str | None]
"""returns why an implementation cannot replace a plain module for an input, or None if it can"""
AnyModule = TypeVar("AnyModule", bound=type[nn.Module])


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation, by other means than the plain module."""

    create: Callable[[nn.Module], nn.Module]
    """returns the fused module over the submodules of a plain one"""
    unsupported_reason: UnsupportedReason
    triton: bool = True
    """whether it needs Triton"""
    benchmarked: tuple[str, ...] = ("training", "evaluation")


class OperationSpec:
    """One operation. A subclass sets `name` and `parts` and defines `implementations`; the rest has defaults."""

    name: str
    """key in the table and in results"""
    parts: ClassVar[dict[str, type[nn.Module] | None]] = {}
    """submodules that a plain module must have; with a type, exactly of that type"""
    methods: tuple[str, ...] = ("forward",)
    """methods of the plain module that the dispatcher replaces"""

    def implementations(self) -> dict[str, Implementation]:
        """Return the implementations by name: "torch", "triton", and "triton NAME" for variants of it.

        `fuse(model, "triton")` uses "triton", else "torch". The others are for the benchmark and "auto".
        """
        raise NotImplementedError

    def structure_problem(self, plain: nn.Module) -> str | None:
        """Return why modules built like `plain` cannot be fused, whatever the input; None if they can."""
        for name, required in self.parts.items():
            part = plain._modules.get(name)
            if part is None:
                return f"it has no submodule {name}"
            if required is not None and type(part) is not required:
                return f"its {name} is {type(part).__name__}, not {required.__name__}"
        return None

    def sizes(self, plain: nn.Module) -> tuple[int, ...]:
        """Return the sizes, other than those of the input, that affect the time; part of the table's key."""
        return ()

    def dispatcher(self) -> "type[KernelDispatcher]":
        from .dispatcher import KernelDispatcher

        return KernelDispatcher

    def plain(self, shape: Shape) -> nn.Module:
        """Return a plain module with random weights, of the first class that was registered as `fusible`."""
        channels, _, _, *sizes = shape
        return next(kind for kind, name in PLAIN_TYPES.items() if name == self.name)(channels, *sizes)

    def workloads(self, device_type: str, dtype: torch.dtype, training: bool, quick: bool) -> "list[Workload]":
        """Return what the benchmark measures, the most valuable first."""
        return []

    def roofline_phases(self, workload: "Workload", direction: str) -> list[Phase]:
        """Return the phases of `Workload.roofline_phases`."""
        raise NotImplementedError

    def compile_specs(self, target: str) -> Iterable[CompileSpec]:
        """Return what `kernels.compile` compiles for an architecture of targets.py."""
        return ()


_SPECS: dict[str, OperationSpec] = {}
PLAIN_TYPES: dict[type[nn.Module], str] = {}
"""classes of networks and the names of their operations"""


def register(spec: OperationSpec) -> None:
    """Add an operation.

    Raises:
        ValueError: there is another operation of this name.
    """
    if type(_SPECS.get(spec.name, spec)) is not type(spec):
        raise ValueError(f"register: operation {spec.name!r} is already registered. Choose another name.")
    _SPECS[spec.name] = spec


def fusible(name: str) -> Callable[[AnyModule], AnyModule]:
    """Return a class decorator: modules of this class, and of its subclasses, compute the operation `name`."""

    def decorate(kind: AnyModule) -> AnyModule:
        PLAIN_TYPES[kind] = name
        return kind

    return decorate


@cache
def _import_folders() -> None:
    package = import_module(__package__)
    for folder in iter_modules(package.__path__):
        if folder.ispkg and find_spec(f"{__package__}.{folder.name}.spec"):
            import_module(f"{__package__}.{folder.name}.spec")


def specs() -> dict[str, OperationSpec]:
    """Return all operations by name: those of the folders next to this file, then those of plugins."""
    _import_folders()
    return _SPECS


def find_operation(plain: nn.Module) -> tuple[OperationSpec | None, str | None]:
    """Return the operation that `plain` computes, and why it cannot be fused; None, None for other modules."""
    kind = next((each for each in type(plain).__mro__ if each in PLAIN_TYPES), None)
    if kind is None:
        return None, None
    spec = specs()[PLAIN_TYPES[kind]]
    for method in spec.methods:
        if getattr(type(plain), method) is not getattr(kind, method):
            return spec, f"{type(plain).__name__} overrides {method} of {kind.__name__}"
    return spec, spec.structure_problem(plain)


@dataclass(frozen=True)
class Workload:
    """One operation with one input and mode, for the benchmark."""

    op: str
    shape: Shape
    batch: int
    dtype: torch.dtype
    """float32, or the autocast dtype over float32 parameters"""
    training: bool
    """forward and backward with batch statistics; else forward without gradients, with running statistics"""

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} B{self.batch} {self.precision} {self.mode}"

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        return "training" if self.training else "evaluation"

    def module(self, device: torch.device) -> nn.Module:
        """Return a plain module with the same random weights at every call."""
        torch.manual_seed(0)
        return specs()[self.op].plain(self.shape).to(device).train(self.training)

    def inputs(self, count: int, layout: str, device: torch.device) -> list[Tensor]:
        """Return `count` inputs like those an earlier convolution would produce, equal for all layouts."""
        generator = torch.Generator(device).manual_seed(0)
        size = self.batch, *self.shape[:3]
        created = [torch.randn(size, generator=generator, device=device).to(self.dtype) for _ in range(count)]
        return [x.to(memory_format=LAYOUTS[layout]).requires_grad_(self.training) for x in created]

    @property
    def input_bytes(self) -> int:
        channels, height, width = self.shape[:3]
        return self.batch * channels * height * width * self.dtype.itemsize

    @property
    def pixels(self) -> int:
        _, height, width = self.shape[:3]
        return self.batch * height * width

    def roofline_phases(self, direction: str) -> list[Phase]:
        """Return the FLOPs and bytes of phases that must run one after another, because a norm needs all pixels first.

        `direction` is "forward" or "backward". A multiply-add counts as two operations. Each phase reads its inputs and
        writes its outputs once. In backward, values between convolutions are recomputed, not read.
        """
        return specs()[self.op].roofline_phases(self, direction)


PAPER_LEVELS: tuple[tuple[Any, ...], ...] = ((64, 256), (128, 128), (256, 64), (512, 32), (1024, 16))
"""channels and side of the maps of the paper's network at 256x256, shallow to deep"""
