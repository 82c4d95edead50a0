"""One MGCC training step, from batches in host memory to updated weights, with a choice of settings.

Shared by the benchmarks train_step, profile_step and runs_per_gpu. `package_step` is the step of mgcc_dist's training
loop, `released_step` the loop of the paper's released code.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.distributed import seed_step
from mgcc_dist.data.batch import ByteBatch
from mgcc_dist.kernels import bias_free
from mgcc_dist.kernels.dispatcher import KernelDispatcher, fuse
from mgcc_dist.kernels.upconv.module import norm_of_upsample_conv
from mgcc_dist.methods.config import MultiLevelCrossConsistencyConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models import mgcc
from mgcc_dist.models.blocks import UpConv
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, TOTAL_STEPS = 0.01, 0.9, 1e-4, 20_000
BATCHES = 4
PAPER_WIDTHS = (64, 128, 256, 512, 1024)
TOY_SIZE, TOY_WIDTHS = 32, (4, 8, 8, 8, 16)

Step = Callable[[int], Tensor]
"""takes the step's number, returns its loss on the device"""


@dataclass(frozen=True)
class StepSettings:
    """Settings of the package's training step; all off is eager float32 without TF32."""

    channels_last: bool = False
    tf32: bool = False
    cudnn_benchmark: bool = False
    bf16: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    fused_kernels: bool = False
    """Triton kernels wherever they support the input: `fuse(network, "triton")`"""
    auto_kernels: bool = False
    """the kernels that were measured to be at least as fast on this device: `fuse(network, "auto")`"""
    phase_upconv: bool = False
    fused_sgd: bool = False
    two_forwards: bool = False
    """separate forward passes for labeled and unlabeled images; measures what the joint forward saves"""
    added_biases: bool = False
    """add biases also before batch norm; measures what leaving them out saves"""


SETTINGS = list(asdict(StepSettings()))
CUDA_ONLY = ("tf32", "cudnn_benchmark", "cuda_graphs", "added_biases")


@dataclass(frozen=True)
class StepConfig:
    """What all settings of a benchmark have in common."""

    size: int
    widths: tuple[int, ...]
    batch: int
    """labeled images per step, and as many unlabeled"""
    steps: int
    device: str
    threads: int


class Unsupported(Exception):
    """A setting that this machine or network does not support; the text is the reason."""


def unsupported_reason(settings: StepSettings, device: str) -> str | None:
    """Return why `settings` cannot run on `device`; None if they can."""
    enabled = asdict(settings)
    if device != "cuda" and (missing := [name for name in CUDA_ONLY if enabled[name]]):
        return f"{missing[0]} needs a CUDA device"
    if settings.fused_kernels and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "fused_kernels needs a CUDA device, because it runs Triton kernels"
    if settings.fused_kernels and settings.auto_kernels:
        return "fused_kernels and auto_kernels exclude each other"
    return None


def make_batches(config: StepConfig, pinned: bool) -> list[ByteBatch]:
    """Return batches in host memory as the loader yields them: noise with a bright disc, whose mask is the label."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: config.size, : config.size] / config.size
    batches = []
    for _ in range(BATCHES):
        count = 2 * config.batch
        centres, radii = generator.uniform(0.3, 0.7, (count, 2, 1, 1)), generator.uniform(0.1, 0.25, (count, 1, 1))
        discs = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < radii**2
        noise = generator.normal(0, 0.3, discs.shape)
        pixels = ((discs - 0.5 + noise).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
        images = torch.from_numpy(pixels)[:, None]
        masks = torch.from_numpy(discs[: config.batch])[:, None]
        batch = ByteBatch(images, masks, torch.arange(count), [str(i) for i in range(count)])
        batches.append(batch.pin_memory() if pinned else batch)
    return batches


def package_step(settings: StepSettings, config: StepConfig) -> tuple[Step, dict[str, Any]]:
    """Build the step of mgcc_dist's training loop with `settings`.

    Returns:
        The step, and facts for the result's row: with a kernel setting, `implementations` counts the modules that run
        in each implementation.

    Raises:
        Unsupported: this machine or network does not support a setting.
    """
    if reason := unsupported_reason(settings, config.device):
        raise Unsupported(reason)
    torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    torch.backends.cudnn.deterministic = False
    bias_free.DEVICES = () if settings.added_biases else ("cuda",)

    method: Any = build(MultiLevelCrossConsistencyConfig(), MGCCConfig(widths=config.widths)).to(config.device).train()
    if settings.phase_upconv:
        for module in method.modules():
            if isinstance(module, UpConv):
                module.__class__ = PhaseUpConv
    if settings.fused_kernels or settings.auto_kernels:
        fuse(method.network, "triton" if settings.fused_kernels else "auto")
    if settings.channels_last:
        method.to(memory_format=torch.channels_last)
    facts: dict[str, Any] = {}
    if settings.fused_kernels or settings.auto_kernels:
        facts["implementations"] = implementations(method.network, settings, config)
    optimizer = torch.optim.SGD(
        method.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=settings.fused_sgd or None
    )
    if settings.two_forwards:
        method.network = TwoForwards(method.network, config.batch)
    if settings.compile:
        method.network.compile(mode="reduce-overhead" if settings.cuda_graphs else "default")
    elif settings.cuda_graphs:
        with autocast(settings, config, cache=False):
            method.network = torch.cuda.make_graphed_callables(method.network, (example(config),))
    batches = make_batches(config, pinned=config.device == "cuda")

    def step(number: int) -> Tensor:
        seed_step(0, number, 0)
        batch = batches[number % len(batches)].to(config.device)
        graphed = settings.cuda_graphs and not settings.compile
        with autocast(settings, config, cache=not graphed):
            losses = method(batch, progress_at(number, config))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses["loss"].detach()

    return step, facts


def autocast(settings: StepSettings, config: StepConfig, cache: bool = True) -> torch.autocast:
    return torch.autocast(config.device, torch.bfloat16, enabled=settings.bf16, cache_enabled=cache)


def example(config: StepConfig) -> Tensor:
    """Return an input of the network [2B,1,S,S]."""
    return torch.zeros(2 * config.batch, 1, config.size, config.size, device=config.device)


def implementations(network: nn.Module, settings: StepSettings, config: StepConfig) -> dict[str, int]:
    """Count the implementations that the dispatchers of `network` pick in one training forward.

    Raises:
        Unsupported: all of them pick plain PyTorch, so there is nothing to measure.
    """
    with recorded_choices(network) as picked, autocast(settings, config):
        network(example(config))
    kinds = {name.partition(" ")[0] for name in picked}
    if settings.fused_kernels and "triton" not in kinds:
        raise Unsupported("fused_kernels: no module of this network supports a Triton kernel at this size")
    if settings.auto_kernels and kinds <= {"plain"}:
        raise Unsupported("auto_kernels: measured.json lists no faster kernel for this device, so all of it is plain")
    return dict(picked)


@contextmanager
def recorded_choices(network: nn.Module) -> Iterator[Counter[str]]:
    """Yield a counter of the implementations that the dispatchers in `network` pick inside the context."""
    picked: Counter[str] = Counter()
    dispatchers: list[Any] = [module for module in network.modules() if isinstance(module, KernelDispatcher)]

    def recording(pick: Callable[[Tensor], str]) -> Callable[[Tensor], str]:
        def recorded(x: Tensor) -> str:
            name = pick(x)
            picked[name] += 1
            return name

        return recorded

    for module in dispatchers:
        module.select = recording(module.select)
    try:
        yield picked
    finally:
        for module in dispatchers:
            del module.select  # the instance's; the class's is visible again


class PhaseUpConv(UpConv):
    """UpConv as four 2x2 convolutions of the low-resolution map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(norm_of_upsample_conv(x, self.conv, self.norm), inplace=True)


class TwoForwards(nn.Module):
    """Run a network on labeled and unlabeled images separately, so that batch norm sees them separately."""

    def __init__(self, network: nn.Module, labeled: int) -> None:
        super().__init__()
        self.network = network
        self.labeled = labeled

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        main_l, auxiliary_l = self.network(x[: self.labeled])
        main_u, auxiliary_u = self.network(x[self.labeled :])
        pairs = zip(auxiliary_l, auxiliary_u, strict=True)
        return torch.cat((main_l, main_u)), [torch.cat(pair) for pair in pairs]


def progress_at(number: int, config: StepConfig) -> Progress:
    return Progress(number, TOTAL_STEPS, epoch=0.0, images=number * config.batch, seed=0)


def released_step(config: StepConfig) -> Step:
    """Build the loop of the paper's released code, which benchmarks/train_step.py describes."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    bias_free.DEVICES = ()
    mgcc.PERTURBATIONS = (_released_feature_dropout, lambda x: F.dropout(x, 0.3), _released_feature_noise)
    network = build_network(MGCCConfig(widths=config.widths)).to(config.device).train()
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    floats = [batch.to("cpu") for batch in make_batches(config, pinned=False)]
    host = [(batch.images.expand(-1, 3, -1, -1).contiguous(), batch.masks) for batch in floats]
    n, logged = config.batch, []

    def supervised(logits: Tensor, masks: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(logits, masks)
        p, y = logits.sigmoid().view(n, -1), masks.view(n, -1)
        dice = (2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)
        return 0.5 * bce + 1 - dice.sum() / n

    def step(number: int) -> Tensor:
        images, masks = (tensor.to(config.device) for tensor in host[number % len(host)])
        main, auxiliary = network(images)
        probabilities = [logits.sigmoid() for logits in (main, *auxiliary)]
        on_labels: Any = sum(supervised(logits[:n], masks) for logits in (main, *auxiliary)) / 4
        agreement: Any = sum(torch.mean((probabilities[0][n:] - p[n:]) ** 2) for p in probabilities[1:]) / 3
        loss = on_labels + consistency_weight("released", progress_at(number, config)) * agreement
        predicted, truth = (t.detach().cpu().numpy() > 0.5 for t in (main[:n].sigmoid(), masks))
        iou = ((predicted & truth).sum() + 1e-5) / ((predicted | truth).sum() + 1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / TOTAL_STEPS) ** 0.9
        logged.append((loss.item(), on_labels.item(), agreement.item(), iou))
        return loss.detach()

    return step


def _released_feature_noise(x: Tensor) -> Tensor:
    noise = torch.distributions.Uniform(-0.3, 0.3).sample(x.shape[1:]).to(x.device)  # drawn on the host
    return x * noise[None] + x


def _released_feature_dropout(x: Tensor) -> Tensor:
    attention = x.mean(1, keepdim=True)
    highest = attention.view(len(x), -1).max(1, keepdim=True).values
    threshold = (highest * np.random.default_rng().uniform(0.7, 0.9)).view(-1, 1, 1, 1)
    return x * (attention < threshold).float()
