"""Base class of the drop-in modules."""

from collections.abc import Mapping
from typing import Any, Self

from torch import nn


class FusedModule(nn.Module):
    """A drop-in for a plain module: the same submodules by the same names, so the same parameters and state_dict keys.

    A subclass defines `make_parts`, which the constructor calls with its sizes.
    """

    def __init__(self, *sizes: int, implementation: Any = None) -> None:
        super().__init__()
        self._adopt(self.make_parts(*sizes), implementation)

    @staticmethod
    def make_parts(*sizes: int) -> Mapping[str, nn.Module]:
        """Return new submodules by name."""
        raise NotImplementedError

    @classmethod
    def from_module(cls, plain: nn.Module, implementation: Any = None) -> Self:
        """Create a fused module that shares the submodules of `plain`."""
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        fused._adopt({name: part for name, part in plain._modules.items() if part is not None}, implementation)
        fused.training = plain.training
        return fused

    def _adopt(self, parts: Mapping[str, nn.Module], implementation: Any) -> None:
        for name, part in parts.items():
            self.add_module(name, part)
        self.implementation = implementation
