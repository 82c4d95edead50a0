"""Fused implementations of MGCC's operations; needs torch, and Triton for the Triton kernels.

    from mgcc_dist.kernels import FusedConvMixer, FusedMSAG, FusedUpConv, fuse

Each operation is one folder, whose docstring derives its kernels. `upconv` is the smallest.

    spec.py           all that `fuse`, the compiler, the benchmark and the table know of it; `specs()` imports it
    module.py         the drop-in module
    op*.py            launches, custom operators and their autograd
    kernels*.py       Triton kernels; `device.py` has the functions that they share
    plan.py, tiles.py block sizes and compiler options by shape and GPU
    compile_specs.py  what is compiled ahead of time, where that is too long for spec.py or op.py

Nothing here imports the rest of the package.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convmixer.module import FusedConvMixer, FusedConvMixerLayer
    from .dispatcher import fuse
    from .msag.module import FusedMSAG
    from .upconv.module import FusedUpConv

__all__ = ["TABLE_PATH", "FusedConvMixer", "FusedConvMixerLayer", "FusedMSAG", "FusedUpConv", "fuse"]

TABLE_PATH = Path(__file__).parent / "measured.json"
"""benchmark results, see `measured`"""

_MODULES = {
    "FusedConvMixer": ".convmixer.module",
    "FusedConvMixerLayer": ".convmixer.module",
    "FusedMSAG": ".msag.module",
    "FusedUpConv": ".upconv.module",
    "fuse": ".dispatcher",
}


def __getattr__(name: str) -> Any:
    """Import on first use, because Triton is optional."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
