"""The fused multi-scale attention gate: custom operators with autograd, and the module that replaces MSAG.

The kernels and their launches are in msag_forward (training), msag_evaluation and msag_backward; msag_tile holds what
they share. Those files state the maths, memory layout, saved tensors and bytes moved.
"""

# mypy: disallow-untyped-defs=False

import itertools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mgcc_dist.kernels import msag_backward, msag_evaluation, msag_forward
from mgcc_dist.kernels.autocast import compute_dtype
from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.msag_evaluation import EVALUATION_IMPLEMENTATIONS, single_kernel_channels
from mgcc_dist.kernels.msag_tile import statistics_dtype
from mgcc_dist.kernels.targets import INTERPRETED, device_target, unsupported_device_reason

BRANCHES = ("pointwise", "ordinary", "dilated")
PARTS = (*BRANCHES, "vote")


@torch.library.custom_op("mgcc_dist::msag_evaluate", mutates_args=())
def msag_evaluate(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, implementation: str
) -> Tensor:
    """The gate with running statistics; see `msag_evaluation.evaluate`."""
    return msag_evaluation.evaluate(x, weights, w_vote, norm, vote_norm, implementation)


@msag_evaluate.register_fake
def _(x, weights, w_vote, norm, vote_norm, implementation):
    return torch.empty_like(x)


@torch.library.custom_op("mgcc_dist::msag_train", mutates_args=())
def msag_train(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, biases: Tensor, gammas: Tensor, betas: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate with batch statistics; see `msag_forward.train_forward`. Differentiable once, with respect to y only."""
    return msag_forward.train_forward(x, weights, w_vote, biases, gammas, betas, eps)


@msag_train.register_fake
def _(x, weights, w_vote, biases, gammas, betas, eps):
    batch, channels, height, width = x.shape
    norm = x.new_empty(5, 3 * channels, dtype=statistics_dtype(x.dtype))
    u = x.new_empty(3, batch, height, width, channels)
    return torch.empty_like(x), u, torch.empty_like(x), norm, norm.new_empty(5, channels)


@torch.library.custom_op("mgcc_dist::msag_backward", mutates_args=())
def msag_train_backward(
    dy: Tensor, x: Tensor, weights: list[Tensor], w_vote: Tensor, u: Tensor, v: Tensor, norm: Tensor, vote_norm: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of `msag_train`; see `msag_backward.backward`."""
    return msag_backward.backward(dy, x, weights, w_vote, u, v, norm, vote_norm)


@msag_train_backward.register_fake
def _(dy, x, weights, w_vote, u, v, norm, vote_norm):
    affine = norm.new_empty(4 * x.shape[1])
    dweights = [torch.empty_like(weight) for weight in weights]
    return torch.empty_like(x), dweights, torch.empty_like(w_vote), affine, torch.empty_like(affine)


def setup_context(ctx, inputs, output):
    x, weights, w_vote, biases, gammas, betas, _ = inputs
    _, u, v, norm, vote_norm = output
    ctx.save_for_backward(x, *weights, w_vote, u, v, norm, vote_norm)
    ctx.dtypes = biases.dtype, gammas.dtype, betas.dtype
    ctx.mark_non_differentiable(u, v, norm, vote_norm)
    ctx.set_materialize_grads(False)


def backward(ctx, dy, *_):
    if dy is None:
        return None, [None] * 3, None, None, None, None, None
    x, *weights, w_vote, u, v, norm, vote_norm = ctx.saved_tensors
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, dweights, dw_vote, dgammas, dbetas = msag_train_backward(dy, x, weights, w_vote, u, v, norm, vote_norm)
    bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
    return (
        dx,
        dweights,
        dw_vote,
        torch.zeros_like(dbetas, dtype=bias_dtype),
        dgammas.to(gamma_dtype),
        dbetas.to(beta_dtype),
        None,
    )


msag_train.register_autograd(backward, setup_context=setup_context)


def unsupported_reason(module: Any, x: Tensor, implementation: str | None = None) -> str | None:
    """Return why the kernels cannot run `module` (an MSAG) on `x`, or None if they can.

    `implementation` is that of evaluation; it does not matter in training.
    """
    norms = [getattr(module, f"{part}_norm") for part in PARTS]
    other_norms = {type(norm).__name__ for norm in norms if type(norm) is not nn.BatchNorm2d}
    if other_norms:
        return f"a norm is {' or '.join(sorted(other_norms))}, not BatchNorm2d"
    if any(norm.running_mean is None or norm.weight is None for norm in norms):
        return "a norm has no running statistics or no weight"
    if len({(norm.eps, norm.momentum, norm.training) for norm in norms}) > 1 or norms[0].momentum is None:
        return "the norms differ in eps, momentum or mode, or have no momentum"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, not 4"
    batch, channels, height, width = x.shape
    if channels % 16 != 0:
        return f"the input has {channels} channels, not a multiple of 16"
    if x.numel() == 0 or height * width * channels >= 2**31:
        return f"the input shape {tuple(x.shape)} is empty or needs 64-bit offsets"
    if norms[0].training and batch * height * width == 1:
        return "the input has a single pixel, which has no variance"
    dtype = compute_dtype(x)
    if (dtype == torch.float64 and not INTERPRETED) or not dtype.is_floating_point or dtype.itemsize < 2:
        return f"the dtype is {dtype}, but the kernels support bfloat16 and float16"
    if dtype == torch.float32 and x.device.type == "cuda":
        return "the dtype is torch.float32, in which the gate kernels spill registers on a GPU"
    if module.vote.weight.device != x.device:
        return f"the input is on {x.device} and the weights are on {module.vote.weight.device}"
    if (reason := unsupported_device_reason(x.device)) is not None:
        return reason
    allowed = single_kernel_channels(device_target(x.device))
    if implementation == "single_kernel" and not norms[0].training and channels not in allowed:
        return f"the single-kernel gate supports {', '.join(map(str, allowed))} channels on this GPU, not {channels}"
    needs_gradient = x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    if not norms[0].training and torch.is_grad_enabled() and needs_gradient:
        return "gradients are enabled in evaluation mode (use torch.no_grad() or torch.inference_mode())"
    return None


class EvaluationWeights(NamedTuple):
    """The cast weights and norm tables of a gate in evaluation."""

    weights: list[Tensor]
    vote: Tensor
    norm: Tensor
    """[3,3C]: center (running mean - bias), scale and shift of the branches"""
    vote_norm: Tensor
    """[3,C]"""


class FusedMSAG(nn.Module):
    """MSAG (`models.blocks`) on fused kernels, with the same parameters, buffers and state_dict keys. Keeps [B,C,H,W].

    The output is channels-last. `implementation` is one of EVALUATION_IMPLEMENTATIONS, or None to choose by channels.
    Evaluation weights are cached until a parameter or buffer changes. A write through `.data` is not detected until the
    next call of train() or eval().

    Raises:
        ValueError: `unsupported_reason` has a reason for this input.
    """

    vote: nn.Conv2d
    vote_norm: nn.BatchNorm2d

    def __init__(self, parts: dict[str, nn.Module], implementation: str | None = None) -> None:
        super().__init__()
        if implementation not in (None, *EVALUATION_IMPLEMENTATIONS):
            raise ValueError(
                f"unknown gate implementation {implementation!r}. Choose from {', '.join(EVALUATION_IMPLEMENTATIONS)}"
            )
        for name, part in parts.items():
            self.add_module(name, part)
        self.implementation = implementation
        self._cached: tuple[object, EvaluationWeights] | None = None

    @classmethod
    def from_module(cls, module: Any, implementation: str | None = None) -> Self:
        """Create a FusedMSAG that shares the convolutions and norms of `module`, an MSAG."""
        fused = cls(dict(module.named_children()), implementation)
        fused.training = module.training
        return fused

    def train(self, mode: bool = True) -> Self:
        self._cached = None
        return super().train(mode)

    def convolutions(self) -> list[Any]:
        return [getattr(self, part) for part in PARTS]

    def norms(self) -> list[Any]:
        return [getattr(self, f"{part}_norm") for part in PARTS]

    def cast_weights(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        *branches, vote = [convolution.weight.to(dtype) for convolution in self.convolutions()]
        return [weight.contiguous(memory_format=torch.channels_last) for weight in branches], vote.contiguous()

    def evaluation_weights(self, dtype: torch.dtype) -> EvaluationWeights:
        if torch.compiler.is_compiling():
            return self._compute_evaluation_weights(dtype)
        tensors = itertools.chain(self.parameters(), self.buffers())
        # Inference tensors have no version counter, and cannot be modified outside inference mode.
        key = (dtype, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self._compute_evaluation_weights(dtype)
        return self._cached[1]

    def _compute_evaluation_weights(self, dtype: torch.dtype) -> EvaluationWeights:
        norms = self.norms()
        precision = statistics_dtype(dtype)
        bias = torch.cat([convolution.bias for convolution in self.convolutions()]).to(precision)
        mean = torch.cat([norm.running_mean for norm in norms]).to(precision)
        variance = torch.cat([norm.running_var for norm in norms]).to(precision)
        scale = torch.cat([norm.weight for norm in norms]) * (variance + norms[0].eps).rsqrt()
        table = torch.stack([mean - bias, scale, torch.cat([norm.bias for norm in norms]).to(precision)])
        branches = 3 * self.vote.out_channels
        return EvaluationWeights(
            *self.cast_weights(dtype), table[:, :branches].contiguous(), table[:, branches:].contiguous()
        )

    def forward(self, x: Tensor) -> Tensor:
        reason = unsupported_reason(self, x, self.implementation)
        if reason is not None:
            raise ValueError(f"the fused gate does not support this input: {reason}")
        dtype = compute_dtype(x)
        inputs = x.to(dtype).contiguous(memory_format=torch.channels_last)
        if self.vote_norm.training:
            return self._forward_training(inputs).to(x.dtype)
        return msag_evaluate(inputs, *self.evaluation_weights(dtype), self.implementation or "auto").to(x.dtype)

    def _forward_training(self, x: Tensor) -> Tensor:
        norms = self.norms()
        y, _, _, norm, vote_norm = msag_train(
            x,
            *self.cast_weights(x.dtype),
            torch.cat([convolution.bias for convolution in self.convolutions()]),
            torch.cat([norm.weight for norm in norms]),
            torch.cat([norm.bias for norm in norms]),
            norms[0].eps,
        )
        self._update_running_statistics(torch.cat([norm, vote_norm], dim=1), x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _update_running_statistics(self, table: Tensor, pixels: int) -> None:
        """Update like BatchNorm, with the unbiased variance; `table` [5,4C] is that of `launch_merge_moments`."""
        norms = self.norms()
        running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        mean, variance = table[0], table[4] * (pixels / (pixels - 1))
        batch = [*mean.to(running[0].dtype).chunk(4), *variance.to(running[0].dtype).chunk(4)]
        torch._foreach_lerp_(running, batch, norms[0].momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the ledger: the gates of MGCC in bfloat16."""
    return [
        spec
        for channels in (64, 128, 256, 512)
        for file in (msag_forward, msag_evaluation, msag_backward)
        for spec in file.compile_specs(channels, target)
    ]
