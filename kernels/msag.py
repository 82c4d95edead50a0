"""The multi-scale attention gate in fused kernels: operators with autograd, and the module that takes MSAG's place.

The kernels and their launches are in msag_forward (training), msag_evaluation and msag_backward; msag_tile is what
these share. FusedMSAG has MSAG's parameters and state_dict keys.
"""

# mypy: disallow-untyped-defs=False

import itertools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mgcc_dist.kernels import msag_backward, msag_evaluation, msag_forward
from mgcc_dist.kernels.autocast import computing_dtype
from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.msag_evaluation import EVALUATION_FORMS, one_kernel_channels
from mgcc_dist.kernels.msag_tile import statistics_dtype
from mgcc_dist.kernels.targets import INTERPRETED, device_refusal, target_of

BRANCHES = ("pointwise", "ordinary", "dilated")
PARTS = (*BRANCHES, "vote")


@torch.library.custom_op("mgcc_dist::msag_evaluate", mutates_args=())
def msag_evaluate(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, norm: Tensor, vote_norm: Tensor, form: str
) -> Tensor:
    """The gate by running statistics; see `msag_evaluation.evaluate`."""
    return msag_evaluation.evaluate(x, weights, w_vote, norm, vote_norm, form)


@msag_evaluate.register_fake
def _(x, weights, w_vote, norm, vote_norm, form):
    return torch.empty_like(x)


@torch.library.custom_op("mgcc_dist::msag_train", mutates_args=())
def msag_train(
    x: Tensor, weights: list[Tensor], w_vote: Tensor, biases: Tensor, gammas: Tensor, betas: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gate by the batch's statistics; see `msag_forward.train`. Differentiable once, in y alone."""
    return msag_forward.train(x, weights, w_vote, biases, gammas, betas, eps)


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


def keep_for_backward(ctx, inputs, output):
    x, weights, w_vote, biases, gammas, betas, _ = inputs
    _, u, v, norm, vote_norm = output
    ctx.save_for_backward(x, *weights, w_vote, u, v, norm, vote_norm)
    ctx.dtypes = biases.dtype, gammas.dtype, betas.dtype
    ctx.mark_non_differentiable(u, v, norm, vote_norm)
    ctx.set_materialize_grads(False)


def differentiate(ctx, dy, *_):
    if dy is None:
        return None, [None] * 3, None, None, None, None, None
    x, *weights, w_vote, u, v, norm, vote_norm = ctx.saved_tensors
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, dweights, dw_vote, dgammas, dbetas = msag_train_backward(dy, x, weights, w_vote, u, v, norm, vote_norm)
    of_bias, of_gamma, of_beta = ctx.dtypes
    return (
        dx,
        dweights,
        dw_vote,
        torch.zeros_like(dbetas, dtype=of_bias),
        dgammas.to(of_gamma),
        dbetas.to(of_beta),
        None,
    )


msag_train.register_autograd(differentiate, setup_context=keep_for_backward)


def supported(module: Any, x: Tensor, form: str | None = None) -> str | None:
    """Why the kernels can't do `module` (an MSAG) on `x`, in evaluation by `form`; None if they can."""
    norms = [getattr(module, f"{part}_norm") for part in PARTS]
    others = {type(norm).__name__ for norm in norms if type(norm) is not nn.BatchNorm2d}
    if others:
        return f"a norm is {' or '.join(sorted(others))}, not BatchNorm2d"
    if any(norm.running_mean is None or norm.weight is None for norm in norms):
        return "a norm has no running statistics or no weight"
    if len({(norm.eps, norm.momentum, norm.training) for norm in norms}) > 1 or norms[0].momentum is None:
        return "its norms differ in eps, momentum or mode, or average their statistics without a momentum"
    if x.dim() != 4:
        return f"its input has {x.dim()} dimensions, not 4"
    batch, channels, height, width = x.shape
    if channels % 16 != 0:
        return f"{channels} channels are no multiple of 16"
    if x.numel() == 0 or height * width * channels >= 2**31:
        return f"an input of shape {tuple(x.shape)}"
    if norms[0].training and batch * height * width == 1:
        return "a single pixel has no variance"
    dtype = computing_dtype(x)
    if (dtype == torch.float64 and not INTERPRETED) or not dtype.is_floating_point or dtype.itemsize < 2:
        return f"dtype {dtype}"
    if dtype == torch.float32 and x.device.type == "cuda":
        return "dtype torch.float32 (the gate kernels spill registers in float32 on a GPU)"
    if module.vote.weight.device != x.device:
        return f"its input is on {x.device} and its weights are on {module.vote.weight.device}"
    if (reason := device_refusal(x.device)) is not None:
        return reason
    offered = one_kernel_channels(target_of(x.device))
    if form == "one_kernel" and not norms[0].training and channels not in offered:
        return f"in one kernel the gate is for {', '.join(map(str, offered))} channels on this GPU, not {channels}"
    needs_gradient = x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    if not norms[0].training and torch.is_grad_enabled() and needs_gradient:
        return "gradients in evaluation mode (is torch.no_grad() missing?)"
    return None


class Evaluation(NamedTuple):
    """What a gate computes with in evaluation."""

    weights: list[Tensor]
    vote: Tensor
    norm: Tensor
    """[3,3C]: centre (running mean - bias), scale and shift of the branches"""
    vote_norm: Tensor
    """[3,C]"""


class FusedMSAG(nn.Module):
    """MSAG (`models.blocks`) in fused kernels: same parameters, buffers and state_dict keys. Keeps the shape [B,C,H,W].

    Its output is channels-last. `form` is one of EVALUATION_FORMS, None for what the roofline favours.
    What evaluation computes with is kept while the parameters are the same tensors in the same version; a write through
    `.data` is not seen before the next call of train() or eval(). Raises ValueError where `supported` has a reason.
    """

    vote: nn.Conv2d
    vote_norm: nn.BatchNorm2d

    def __init__(self, parts: dict[str, nn.Module], form: str | None = None) -> None:
        super().__init__()
        if form not in (None, *EVALUATION_FORMS):
            raise ValueError(f"no form {form!r} of the gate in evaluation; there are {', '.join(EVALUATION_FORMS)}")
        for name, part in parts.items():
            self.add_module(name, part)
        self.form = form
        self.kept: tuple[object, Evaluation] | None = None

    @classmethod
    def from_module(cls, module: Any, form: str | None = None) -> Self:
        """In place of `module`, an MSAG, with its very convolutions and norms."""
        fused = cls(dict(module.named_children()), form)
        fused.training = module.training
        return fused

    def train(self, mode: bool = True) -> Self:
        self.kept = None
        return super().train(mode)

    def convolutions(self) -> list[Any]:
        return [getattr(self, part) for part in PARTS]

    def norms(self) -> list[Any]:
        return [getattr(self, f"{part}_norm") for part in PARTS]

    def cast_weights(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        *branches, vote = [convolution.weight.to(dtype) for convolution in self.convolutions()]
        return [weight.contiguous(memory_format=torch.channels_last) for weight in branches], vote.contiguous()

    def for_evaluation(self, dtype: torch.dtype) -> Evaluation:
        if torch.compiler.is_compiling():
            return self.make_for_evaluation(dtype)
        tensors = itertools.chain(self.parameters(), self.buffers())
        # Tensors made in inference mode have no version and can't be written to outside it.
        key = (dtype, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))
        if self.kept is None or self.kept[0] != key:
            self.kept = key, self.make_for_evaluation(dtype)
        return self.kept[1]

    def make_for_evaluation(self, dtype: torch.dtype) -> Evaluation:
        norms = self.norms()
        precision = statistics_dtype(dtype)
        bias = torch.cat([convolution.bias for convolution in self.convolutions()]).to(precision)
        mean = torch.cat([norm.running_mean for norm in norms]).to(precision)
        variance = torch.cat([norm.running_var for norm in norms]).to(precision)
        scale = torch.cat([norm.weight for norm in norms]) * (variance + norms[0].eps).rsqrt()
        table = torch.stack([mean - bias, scale, torch.cat([norm.bias for norm in norms]).to(precision)])
        branches = 3 * self.vote.out_channels
        return Evaluation(*self.cast_weights(dtype), table[:, :branches].contiguous(), table[:, branches:].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        reason = supported(self, x, self.form)
        if reason is not None:
            raise ValueError(f"the fused gate can't take this: {reason}")
        dtype = computing_dtype(x)
        inputs = x.to(dtype).contiguous(memory_format=torch.channels_last)
        if self.vote_norm.training:
            return self.by_batch_statistics(inputs).to(x.dtype)
        return msag_evaluate(inputs, *self.for_evaluation(dtype), self.form or "auto").to(x.dtype)

    def by_batch_statistics(self, x: Tensor) -> Tensor:
        norms = self.norms()
        y, _, _, norm, vote_norm = msag_train(
            x,
            *self.cast_weights(x.dtype),
            torch.cat([convolution.bias for convolution in self.convolutions()]),
            torch.cat([norm.weight for norm in norms]),
            torch.cat([norm.bias for norm in norms]),
            norms[0].eps,
        )
        self.update_running_statistics(torch.cat([norm, vote_norm], dim=1), x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def update_running_statistics(self, table: Tensor, pixels: int) -> None:
        """As BatchNorm does, with the unbiased variance; `table` [5,4C] is that of `msag_forward.merge`."""
        norms = self.norms()
        running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        mean, variance = table[0], table[4] * (pixels / (pixels - 1))
        batch = [*mean.to(running[0].dtype).chunk(4), *variance.to(running[0].dtype).chunk(4)]
        torch._foreach_lerp_(running, batch, norms[0].momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def cases(target: str) -> list[Case]:
    """Compiled forms for the ahead-of-time ledger: the gates of MGCC, in bfloat16."""
    return [
        case
        for channels in (64, 128, 256, 512)
        for file in (msag_forward, msag_evaluation, msag_backward)
        for case in file.cases(channels, target)
    ]
