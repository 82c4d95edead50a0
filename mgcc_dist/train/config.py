"""Configs of the training loop and the optimizers."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mgcc_dist.common.components import Registry
from mgcc_dist.common.options import alternative_to, neutral
from mgcc_dist.common.value_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitInterval


@dataclass(frozen=True)
class OptimizerConfig:
    """Keys that all optimizers have. A `torch.optim.Optimizer` is called with the parameters, lr, and all keys."""

    name: str
    """optimizer (paper: sgd for segmentation, adam for the autoencoder, adamw for the denoiser)"""
    weight_decay: NonNegativeFloat = 1e-4
    """weight decay (paper: 1e-4 for segmentation)"""

    offloads: ClassVar[bool] = False
    """whether DeepSpeed can keep its state on the CPU"""


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: UnitInterval = 0.9
    """momentum (paper: 0.9)"""


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2015)."""

    name: Literal["adam"] = "adam"
    offloads = True


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    offloads = True


OPTIMIZERS = Registry("optimizer", OptimizerConfig, default="sgd")
OPTIMIZERS.register(SGDConfig, "torch.optim:SGD")
OPTIMIZERS.register(AdamConfig, "torch.optim:Adam")
OPTIMIZERS.register(AdamWConfig, "torch.optim:AdamW")


@dataclass(frozen=True)
class LoopConfig:
    epochs: PositiveFloat | None = alternative_to("steps")
    """length in epochs of the labeled images (of all images if none are labeled); replaces `steps` of a preset (paper:
    300 for segmentation, 1000 for autoencoder and denoiser)"""
    steps: PositiveInt | None = alternative_to("epochs")
    """length in optimizer steps; replaces `epochs` of a preset"""
    optimizer: OptimizerConfig = field(default_factory=SGDConfig)
    """optimizer"""
    learning_rate: PositiveFloat = 0.01
    """peak learning rate (paper: 0.01 segmentation, 1e-6 autoencoder, 1e-4 denoiser)"""
    schedule: Literal["poly", "constant", "cosine"] = "poly"
    """decay of the learning rate from its peak to 0 (paper: poly, power 0.9)"""
    warmup_epochs: NonNegativeFloat = 0.0
    """epochs of linear learning rate warmup, the same images on any number of ranks"""
    warmup_steps: NonNegativeInt = 0
    """the same in optimizer steps, which on more ranks are more images"""
    accumulation: PositiveInt = 1
    """micro-steps per optimizer step, whose gradients are averaged"""
    clip_norm: NonNegativeFloat = 0.0
    """maximum L2 norm of the gradient; 0 does not clip (paper: not stated; released code: no clipping)"""
    ema_decay: UnitInterval = 0.0
    """decay of the weights' exponential moving average, which is then validated and saved; 0: no average"""
    precision: Literal["no", "fp16", "bf16"] | None = None
    """mixed precision (null: use the launcher's setting)"""
    tf32: bool = True
    """without mixed precision, allow TF32 in convolutions and matrix products on GPUs (torch's default: only in
    convolutions)"""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """torch.compile mode of the networks (not of the autoencoder); reduce-overhead and max-autotune also use CUDA
    graphs. Compiling takes minutes at the start of a run"""
    seed: NonNegativeInt = 0
    """seed of weights, order, augmentation, noise"""
    log_every: PositiveInt = neutral(10)
    """optimizer steps between rows of metrics.jsonl"""
    tracker: Literal["tensorboard", "mlflow", "wandb", "trackio", "none"] = neutral("tensorboard")
    """where else the metrics go. MLflow, Weights & Biases and trackio read their address, project and credentials from
    their own environment variables (docs/how-to/trackers.md)"""
    validate_every: PositiveFloat = 1.0
    """epochs between validations; the last step is always validated"""
    checkpoint_every: PositiveInt = neutral(500)
    """optimizer steps between checkpoints; one is also saved after a signal and after the last step"""
    keep_checkpoints: PositiveInt = neutral(2)
    """number of checkpoints to keep"""
    profile: PositiveInt | None = neutral(None)
    """trace five steps from this one on with torch.profiler, on rank 0, to `profile/` in the run folder"""
    timeout_minutes: PositiveFloat = neutral(30.0)
    """longest time that ranks wait for one that hangs, before the run ends and names it"""

    @property
    def fixed_length(self) -> str:
        """Why a run can't be extended; "" if its steps do not depend on how many there are."""
        return "" if self.schedule == "constant" else f"loop.schedule {self.schedule} depends on the length of the run"

    def __post_init__(self) -> None:
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below {2**32:,}, got {self.seed:,}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"loop.epochs and loop.steps: expected a value for one of them, got {self.epochs} and {self.steps}"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"loop.warmup_epochs and loop.warmup_steps: expected a value for one of them, got {self.warmup_epochs} "
                f"and {self.warmup_steps}. Set the other to 0."
            )
