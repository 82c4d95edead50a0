"""Fused implementations of MGCC's operations; needs torch, and Triton for the Triton kernels.

    from mgcc_dist.kernels import FusedConvMixer, FusedMSAG, FusedUpConv, fuse

Each operation is one folder: Triton kernels (`kernels*.py`), custom operators (`op*.py`), the drop-in module
(`module.py`), and a spec (`spec.py`) with all that `fuse`, the compiler, the benchmark and the table need to know. The
folder's docstring derives the kernels. Nothing here imports the rest of the package.
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
