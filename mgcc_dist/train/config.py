"""What the training loop is set by."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.value_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitInterval


@dataclass(frozen=True)
class LoopConfig:
    epochs: PositiveFloat | None = None
    """length in epochs of the labeled images (of all images where there are no labels); or give `steps` (paper: 300 for
    segmentation, 1000 for autoencoder and denoiser)"""
    steps: PositiveInt | None = None
    """length in optimizer steps, instead of `epochs`"""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """paper: sgd for segmentation, adam for the autoencoder, adamw for the denoiser"""
    learning_rate: PositiveFloat = 0.01
    """at its highest (paper: 0.01 segmentation, 1e-6 autoencoder, 1e-4 denoiser)"""
    momentum: UnitInterval = 0.9
    """of sgd (paper: 0.9)"""
    weight_decay: NonNegativeFloat = 1e-4
    """paper: 1e-4 for segmentation"""
    schedule: Literal["poly", "constant", "cosine"] = "poly"
    """how the learning rate falls from its highest value to 0 at the end (paper: poly, power 0.9)"""
    warmup_steps: NonNegativeInt = 0
    """optimizer steps over which the learning rate rises from 0, linearly"""
    accumulation: PositiveInt = 1
    """micro-steps whose gradients are averaged into one optimizer step"""
    clip_norm: NonNegativeFloat = 0.0
    """largest L2 norm of the gradient; 0 does not clip (paper: silent; released code: no clipping)"""
    ema_decay: UnitInterval = 0.0
    """decay of the weights' moving average, which is then what is validated and saved; 0 keeps none"""
    precision: Literal["no", "fp16", "bf16"] | None = None
    """mixed precision; null takes what `accelerate launch` was told"""
    tf32: bool = True
    """without mixed precision, let GPUs round the inputs of convolutions and matrix products to TF32 (torch's default:
    convolutions alone)"""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """torch.compile of the networks that a step calls as a whole (not the autoencoder), in this mode; reduce-overhead
    and max-autotune also replay CUDA graphs. Costs minutes at the start of a run"""
    seed: NonNegativeInt = 0
    """of initial weights, sample order, augmentation and noise"""
    log_every: PositiveInt = 10
    """optimizer steps between rows of metrics.jsonl"""
    validate_every: PositiveFloat = 1.0
    """epochs between validations; the last step is always validated"""
    checkpoint_every: PositiveInt = 500
    """optimizer steps between checkpoints; a signal and the last step save one too"""
    keep_checkpoints: PositiveInt = 2
    """older checkpoints are deleted"""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give one of loop.epochs and loop.steps, got {self.epochs} and {self.steps}")
