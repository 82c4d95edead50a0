"""Latency of one image through MGCC's inference network, next to the paper's 32 ms on an RTX 4090.

    python -m benchmarks.latency --out latency.json

eager           float32, contiguous, as in the paper
mixed           channels-last; bfloat16 where the device has instructions for it
folded          also BatchNorm folded into the convolutions of blocks, gates and up-convolutions
folded_phases   also up-convolutions as phase convolutions
folded_kernels  the Triton kernels of gates, ConvMixer layers and up-convolutions, and BatchNorm folded into blocks

On a GPU each is timed call by call, and as one CUDA graph of the complete network, which has no launches to wait for.
A ConvMixer layer has GELU between convolution and norm, so its norms are not folded. Each row states the relative error
of its logits against those of `eager`. Weights are random.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.step import PAPER_WIDTHS
from mgcc_dist.common.environment import benchmark_header, has_bf16
from mgcc_dist.common.files import write_json
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.models.blocks import MSAG, NORMED_CONVOLUTIONS, DoubleConv, UpConv
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.reporting.efficiency_measure import measure_latency
from mgcc_dist.reporting.paper import load_paper_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", type=int, default=256, help="image side in pixels (default: 256, the paper's)")
    parser.add_argument("--widths", type=int, nargs="+", default=PAPER_WIDTHS, help="(default: the paper's)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = benchmark_header("benchmarks.latency", device)
    paper = load_paper_table("table_VII")
    facts = {"size": options.size, "widths": list(options.widths)}
    facts |= {"paper": {"milliseconds": paper.rows["MGCC"]["ms"], "setting": paper.setting}}
    torch.manual_seed(0)
    plain = build_network(MGCCConfig(widths=tuple(options.widths))).inference_module().eval()
    rows: dict[str, dict[str, Any]] = {}
    for name in ("eager", "mixed", "folded", "folded_phases", "folded_kernels"):
        rows[name] = measure(name, plain, options.size, device)
        print(f"{name}: {rows[name]}", flush=True)
        write_json(options.out, {**header, **facts, "rows": rows})
    print(f"latency: the paper has {facts['paper']['milliseconds']} ms on another GPU -> {options.out}")


@torch.inference_mode()
def measure(name: str, plain: nn.Module, size: int, device: torch.device) -> dict[str, Any]:
    """Return the milliseconds of one image by mode, and the error of its logits."""
    if name == "folded_kernels" and device.type != "cuda":
        return {"not_run": "needs a CUDA device"}
    image = torch.rand(1, 3, size, size, device=device)
    network = prepare(name, plain, device)
    expected = copy.deepcopy(plain).to(device)(image)
    error = (network(image).float() - expected).norm() / expected.norm()
    found = {
        f"{mode.lower().replace(' ', '_')}_ms": round(ms, 3) for mode, ms in measure_latency(network, image).items()
    }
    return found | {"relative_error": round(error.item(), 6)}


def prepare(name: str, plain: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of `plain` on `device` that computes as the row `name` says."""
    network = copy.deepcopy(plain).to(device)
    if name == "eager":
        return network
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    if name == "folded":
        fold_norms(network, (DoubleConv, UpConv, MSAG), dtype)
    elif name == "folded_phases":
        fuse(fold_norms(network, (DoubleConv, MSAG), dtype), "torch")
    elif name == "folded_kernels":
        fuse(fold_norms(network, (DoubleConv,), dtype), "triton")
    return Autocast(network.to(memory_format=torch.channels_last), dtype)  # type: ignore[call-overload]


def fold_norms(network: nn.Module, kinds: Sequence[type[nn.Module]], dtype: torch.dtype) -> nn.Module:
    """Fold BatchNorm into the convolutions of these classes, and store these in `dtype`. Modifies and returns it."""
    for module in network.modules():
        for conv, norm in next((NORMED_CONVOLUTIONS[kind] for kind in kinds if isinstance(module, kind)), ()):
            folded = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            setattr(module, conv, folded.to(dtype))  # so that autocast has nothing to cast
            setattr(module, norm, nn.Identity())
    return network


class Autocast(nn.Module):
    """A network under autocast to `dtype`."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(x)


if __name__ == "__main__":
    main()
