"""One whole MGCC training step, from batches in host memory to updated weights: a ladder of settings.

    python -m benchmarks.train_step --out benchmarks/results/train_step-cpu.json
    python -m benchmarks.train_step --size 256 --widths 64 128 256 512 1024 --steps 60 --out FILE       (on a GPU)

plain     a loop of this file's own, as the paper's released code has it: eager, NCHW, three-channel images copied from
          pageable memory, one forward for all eight images, F-Noise drawn on the host and copied, SGD as torch chooses
          it, cuDNN deterministic, and in every step three losses and a training IoU read on the host. The network has
          the package's own layers; they are the paper's. As there, cuDNN may use TF32, torch's default.
eager     this package's step (method, seeds and losses as train/loop.py calls them) in float32 without TF32: no read,
          perturbations on the device, images of one channel. Nothing else.
...       eager with one setting more, each on its own.
fastest   eager with every setting that on its own was faster than eager on this machine.

Each rung runs in a process of its own, from the same weights on the same images, so that its peak memory and its global
flags are its own; a rung that this machine can't run is listed with the reason. Times are of `--steps` steps in three
blocks: the median block, lowest and highest beside it. Losses differ a little between rungs, because they draw other
perturbations.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe
from mgcc_dist.common.distributed import seed_step
from mgcc_dist.common.files import write_json
from mgcc_dist.data.loader import Batch
from mgcc_dist.kernels.upconv import upsample_conv
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.registry import build
from mgcc_dist.models import mgcc
from mgcc_dist.models.blocks import UpConv
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.registry import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

RATE, MOMENTUM, DECAY, TOTAL = 0.01, 0.9, 1e-4, 20_000
WARM_UP, BLOCKS = 3, 3


@dataclass(frozen=True)
class Rung:
    """Settings of the package's step."""

    channels_last: bool = False
    tf32: bool = False
    cudnn_benchmark: bool = False
    bf16: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    fused_kernels: bool = False
    phase_upconv: bool = False
    fused_sgd: bool = False
    two_forwards: bool = False
    """labeled and unlabeled images apart; the other way round, it shows what one forward saves"""


SETTINGS = list(asdict(Rung()))


class CannotRun(Exception):
    """A rung that this machine does not have what it takes for; the text is the reason."""


@dataclass(frozen=True)
class Case:
    """What all rungs have in common."""

    size: int
    widths: tuple[int, ...]
    batch: int
    """labeled images a step, and as many unlabeled"""
    steps: int
    device: str
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (paper: 256)")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="(paper: 64 to 1024)")
    parser.add_argument("--batch", type=int, default=4, help="labeled images, and as many unlabeled (paper: 4)")
    parser.add_argument("--steps", type=int, default=9, help="timed steps a rung")
    parser.add_argument("--rungs", nargs="+", choices=["eager", *SETTINGS], help="only these, beside plain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no rung but the last one after this time"
    )
    options = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(options.size, tuple(options.widths), options.batch, max(BLOCKS, options.steps), device, options.threads)

    rungs: dict[str, Rung | None] = {"plain": None, "eager": Rung()}
    rungs |= {name: replace(Rung(), **{name: True}) for name in SETTINGS}
    if options.rungs:
        rungs = {name: rung for name, rung in rungs.items() if name in ("plain", "eager", *options.rungs)}
    rows: dict[str, dict[str, Any]] = {}
    facts = {**describe(), "case": asdict(case)}
    for name, rung in rungs.items():
        if name != "plain" and time.monotonic() - began > options.seconds:
            rows[name] = {"not_run": f"its turn came after --seconds {options.seconds:g}"}
        else:
            rows[name] = _in_a_process(name, rung, case)
        write_json(options.out, {**facts, "rows": rows})
    helped = [name for name in SETTINGS if _speed(rows.get(name, {})) > _speed(rows["eager"])]
    if "two_forwards" in helped:
        helped.remove("two_forwards")
    fastest = replace(Rung(), **dict.fromkeys(helped, True))
    rows["fastest"] = {"settings": helped} | _in_a_process("fastest", fastest, case)
    for row in rows.values():
        for base in ("plain", "eager"):
            if _speed(row) and _speed(rows[base]):
                row[f"ratio_to_{base}"] = round(_speed(row) / _speed(rows[base]), 3)
    write_json(options.out, {**facts, "rows": rows})
    print(f"train_step: {options.out}")


def _speed(row: dict[str, Any]) -> float:
    return row.get("steps_per_processor_second") or row.get("steps_per_second", 0.0)


def _in_a_process(name: str, rung: Rung | None, case: Case) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            row = pool.submit(measure, rung, case).result()
        except CannotRun as error:
            row = {"not_run": str(error)}
        except BrokenProcessPool:
            row = {"not_run": "its process died; out of memory?"}
        except Exception as error:  # whatever a compiler or a driver throws, the other rungs still count
            row = {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(f"{name}: {row}", flush=True)
    return row


def measure(rung: Rung | None, case: Case) -> dict[str, Any]:
    """Time one rung in this process; None is the plain loop."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    began = time.perf_counter()
    step = plain_step(case) if rung is None else package_step(rung, case)
    loss = torch.zeros(())
    blocks, spent = [], []
    for i in range(WARM_UP):
        loss = step(i)
        if i == 0:
            _wait(case)
            first = time.perf_counter() - began
    _wait(case)
    number = WARM_UP
    for _ in range(BLOCKS):
        began, processor = time.perf_counter(), time.process_time()
        for _ in range(case.steps // BLOCKS):
            loss = step(number)
            number += 1
        _wait(case)
        blocks.append((case.steps // BLOCKS) / (time.perf_counter() - began))
        spent.append((case.steps // BLOCKS) / (time.process_time() - processor))
    if case.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        own = {}
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        own = {"steps_per_processor_second": round(statistics.median(spent), 3)}
    return own | {
        "steps_per_second": round(statistics.median(blocks), 3),
        "steps_per_second_lowest_highest": [round(min(blocks), 3), round(max(blocks), 3)],
        "peak_memory_mib": round(peak),
        "seconds_to_first_step": round(first, 1),
        "loss": round(loss.item(), 4),
        "loss_after_steps": number,
    }


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def images_and_masks(case: Case, pinned: bool) -> list[Batch]:
    """Four batches in host memory: noise with a bright disc, which is the mask."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: case.size, : case.size] / case.size
    batches = []
    for _ in range(4):
        count = 2 * case.batch
        centres, radii = generator.uniform(0.3, 0.7, (count, 2, 1, 1)), generator.uniform(0.1, 0.25, (count, 1, 1))
        discs = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < radii**2
        noise = generator.normal(0, 0.3, discs.shape)
        images = torch.from_numpy((discs - 0.5 + noise).clip(-1, 1).astype(np.float32))[:, None]
        masks = torch.from_numpy(discs[: case.batch].astype(np.float32))[:, None]
        batch = Batch(images, masks, torch.arange(count), [str(i) for i in range(count)])
        batches.append(batch.pin_memory() if pinned else batch)
    return batches


def package_step(rung: Rung, case: Case) -> Callable[[int], Tensor]:
    """The step of train/loop.py with the settings of `rung`; returns the loss, on the device."""
    cuda = case.device == "cuda"
    if not cuda and (missing := [name for name in ("tf32", "cudnn_benchmark", "cuda_graphs") if asdict(rung)[name]]):
        raise CannotRun(f"{missing[0]} needs a CUDA device")
    torch.backends.cudnn.allow_tf32 = rung.tf32
    torch.set_float32_matmul_precision("high" if rung.tf32 else "highest")
    torch.backends.cudnn.benchmark = rung.cudnn_benchmark
    torch.backends.cudnn.deterministic = False

    method = build(MethodConfig("mgcc"), NetworkConfig("mgcc", widths=case.widths)).to(case.device).train()
    if rung.phase_upconv:
        for module in method.modules():
            if isinstance(module, UpConv):
                module.__class__ = PhaseUpConv
    if rung.fused_kernels:
        _fuse(method.network, cuda)
    if rung.channels_last:
        method.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), RATE, MOMENTUM, weight_decay=DECAY, fused=rung.fused_sgd or None)
    if rung.two_forwards:
        method.network = TwoForwards(method.network, case.batch)
    if rung.compile:
        method.network.compile(mode="reduce-overhead" if rung.cuda_graphs else "default")
    elif rung.cuda_graphs:
        example = torch.zeros(2 * case.batch, 1, case.size, case.size, device=case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled=rung.bf16, cache_enabled=False):
            method.network = torch.cuda.make_graphed_callables(method.network, (example,))
    batches = images_and_masks(case, pinned=cuda)

    def step(number: int) -> Tensor:
        seed_step(0, number, 0)
        batch = batches[number % len(batches)].to(case.device)
        graphed = rung.cuda_graphs and not rung.compile
        with torch.autocast(case.device, torch.bfloat16, enabled=rung.bf16, cache_enabled=not graphed):
            losses = method(batch, Progress(number, TOTAL, 0.0, 0))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses["loss"].detach()

    return step


def _fuse(network: nn.Module, cuda: bool) -> None:
    try:
        from mgcc_dist.kernels.fuse import fuse
    except ImportError as error:
        raise CannotRun(f"kernels/fuse.py is not there ({error})") from error
    if not cuda:
        raise CannotRun("fused_kernels are Triton kernels and need a GPU")
    fuse(network)


class PhaseUpConv(UpConv):
    """UpConv as four 2x2 convolutions of the small map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(upsample_conv(x, self.conv.weight, self.conv.bias)), inplace=True)


class TwoForwards(nn.Module):
    """A network that sees labeled and unlabeled images apart, and so normalises them apart."""

    def __init__(self, network: nn.Module, labeled: int) -> None:
        super().__init__()
        self.network = network
        self.labeled = labeled

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        (main, auxiliary), (more_main, more_auxiliary) = (
            self.network(x[: self.labeled]),
            self.network(x[self.labeled :]),
        )
        pairs = zip(auxiliary, more_auxiliary, strict=True)
        return torch.cat((main, more_main)), [torch.cat(pair) for pair in pairs]


def plain_step(case: Case) -> Callable[[int], Tensor]:
    """The loop of the released code; see the module's text."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    mgcc.PERTURBATIONS = (_plain_feature_dropout, lambda x: F.dropout(x, 0.3), _plain_feature_noise)
    network = build_network(NetworkConfig("mgcc", widths=case.widths)).to(case.device).train()
    optimizer = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    host = [(batch.images.expand(-1, 3, -1, -1).contiguous(), batch.masks) for batch in images_and_masks(case, False)]
    n, logged = case.batch, []

    def supervised(logits: Tensor, masks: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(logits, masks)
        p, y = logits.sigmoid().view(n, -1), masks.view(n, -1)
        dice = (2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)
        return 0.5 * bce + 1 - dice.sum() / n

    def step(number: int) -> Tensor:
        images, masks = (tensor.to(case.device) for tensor in host[number % len(host)])
        main, auxiliary = network(images)
        probabilities = [logits.sigmoid() for logits in (main, *auxiliary)]
        on_labels = sum(supervised(logits[:n], masks) for logits in (main, *auxiliary)) / 4
        agreement = sum(torch.mean((probabilities[0][n:] - p[n:]) ** 2) for p in probabilities[1:]) / 3
        loss = on_labels + consistency_weight("released", Progress(number, TOTAL, 0.0, 0)) * agreement
        found, there = (t.detach().cpu().numpy() > 0.5 for t in (main[:n].sigmoid(), masks))
        iou = ((found & there).sum() + 1e-5) / ((found | there).sum() + 1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number / TOTAL) ** 0.9
        logged.append((loss.item(), on_labels.item(), agreement.item(), iou))
        return loss.detach()

    return step


def _plain_feature_noise(x: Tensor) -> Tensor:
    noise = torch.distributions.Uniform(-0.3, 0.3).sample(x.shape[1:]).to(x.device)  # drawn on the host
    return x * noise[None] + x


def _plain_feature_dropout(x: Tensor) -> Tensor:
    attention = x.mean(1, keepdim=True)
    highest = attention.view(len(x), -1).max(1, keepdim=True).values
    threshold = (highest * np.random.default_rng().uniform(0.7, 0.9)).view(-1, 1, 1, 1)
    return x * (attention < threshold).float()


if __name__ == "__main__":
    main()
