"""mgcc-dist: the MGCC method (arXiv 2305.09447) for ultrasound segmentation, from latent diffusion to masks.

    import mgcc_dist as mgcc

    predictor = mgcc.load("out/runs/mgcc_1")            # a run folder or its model.safetensors
    mask, probability = predictor.predict("image.png")  # file, PIL image, array, or a batch of these
    network = mgcc.build_network("mgcc", widths=(16, 32, 64, 128, 256))
    images = mgcc.load_pipeline("out/ldm").sample(8)    # PIL images

Functions are imported on first use, so `import mgcc_dist` itself loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mgcc_dist.common import threads as _threads

__version__ = "0.1.0"

if _threads.is_program():  # before anything imports torch
    _threads.configure_threads()

__all__ = ["UserError", "__version__", "build_network", "fuse", "load", "load_pipeline"]

if TYPE_CHECKING:
    from mgcc_dist.common.errors import UserError
    from mgcc_dist.inference.image_sampler import load_pipeline
    from mgcc_dist.inference.networks import build_network
    from mgcc_dist.inference.predictor import load
    from mgcc_dist.kernels.dispatcher import fuse

_MODULES = {
    "UserError": "common.errors",
    "build_network": "inference.networks",
    "fuse": "kernels.dispatcher",
    "load": "inference.predictor",
    "load_pipeline": "inference.image_sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
