"""The drop-in module of the gate."""

# mypy: disallow-untyped-defs=False

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..autocast import compute_dtype
from ..fused_module import FusedModule
from ..launch import statistics_dtype
from .op import BRANCH_CONVOLUTIONS, msag_evaluate, msag_train
from .spec import PARTS, unsupported_reason
from .tiles import EVALUATION_IMPLEMENTATIONS


class EvaluationWeights(NamedTuple):
    """The cast weights and norm tables of a gate in evaluation."""

    weights: list[Tensor]
    vote: Tensor
    norm: Tensor
    """[3,3C]: center (running mean - bias), scale and shift of the branches"""
    vote_norm: Tensor
    """[3,C]"""


class FusedMSAG(FusedModule):
    """The multi-scale attention gate on fused kernels. Keeps [B,C,H,W].

    The output is channels-last. `implementation` is one of EVALUATION_IMPLEMENTATIONS, or None to choose by channels.
    Evaluation weights are cached until a parameter or buffer changes. A write through `.data` is not detected until the
    next call of train() or eval().

    Raises:
        ValueError: `unsupported_reason` has a reason for this input.
    """

    vote: nn.Conv2d
    vote_norm: nn.BatchNorm2d

    def __init__(self, channels: int, implementation: str | None = None) -> None:
        super().__init__(channels, implementation=implementation)

    @staticmethod
    def make_parts(*sizes: int) -> dict[str, nn.Module]:
        (channels,) = sizes
        parts: dict[str, nn.Module] = {}
        for part, (size, dilation) in zip(PARTS, (*BRANCH_CONVOLUTIONS, (1, 1)), strict=True):
            inputs, padding = 3 * channels if part == "vote" else channels, dilation * (size // 2)
            parts[part] = nn.Conv2d(inputs, channels, size, padding=padding, dilation=dilation)
            parts[f"{part}_norm"] = nn.BatchNorm2d(channels)
        return parts

    def _adopt(self, parts: Mapping[str, nn.Module], implementation: Any) -> None:
        if implementation not in (None, *EVALUATION_IMPLEMENTATIONS):
            raise ValueError(
                f"unknown gate implementation {implementation!r}. Choose from {', '.join(EVALUATION_IMPLEMENTATIONS)}"
            )
        super()._adopt(parts, implementation)
        self._cached: tuple[object, EvaluationWeights] | None = None

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
