"""Measure the networks of Table VII on this machine."""

import functools
import os
import platform
import statistics
import time

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from mgcc_dist.bench.timing import capture_graph, median_cuda_ms
from mgcc_dist.common.config import Layer, resolve
from mgcc_dist.common.environment import processor
from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.networks import NetworkSection
from mgcc_dist.models.network import build_network
from mgcc_dist.reporting.efficiency import CHANNELS, IMAGE_SIZE, WARM_UP, Cost, Efficiency
from mgcc_dist.reporting.paper import load_paper_table
from mgcc_dist.sweep.expansion import Sweep

REPEATS = {"cpu": 5, "cuda": 51}  # odd, so the median is a measured value


def measure_sweep(sweep: Sweep) -> Efficiency:
    """Build and measure the inference network of each row: without auxiliary decoders, in evaluation mode.

    Raises:
        UserError: a row has keys other than those of `network`, or invalid ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paper = load_paper_table(sweep.paper) if sweep.paper else None
    machine = describe_machine(device)  # before the measurements raise the load average
    costs = {row: measure_cost(build_row_network(sweep, row), device) for row in sweep.rows}
    return Efficiency(sweep, paper, machine, REPEATS[device.type], costs)


def build_row_network(sweep: Sweep, row: str) -> nn.Module:
    """Build the network of a row, which may have no other keys.

    Raises:
        UserError: the row has other keys, or the network's are wrong.
    """
    keys = sweep.rows[row]
    if set(keys) != {"network"}:
        raise UserError(
            f"{sweep.name}: row {row!r} must have only network keys, got {', '.join(keys) or 'none'}. "
            "Pass a sweep file such as configs/sweeps/table_7.yaml to --efficiency."
        )
    section = resolve(NetworkSection, [Layer(keys, f"{sweep.path}: rows.{row}")])
    return build_network(section.network).inference_module().eval()


@torch.no_grad()
def measure_cost(network: nn.Module, device: torch.device, image_size: int = IMAGE_SIZE) -> Cost:
    """Measure the cost of one image [1,CHANNELS,image_size,image_size]; moves `network` to `device`."""
    network.to(device)
    image = torch.rand(1, CHANNELS, image_size, image_size, device=device)
    # The table lists uncounted operations, so no warnings; modules that are not called have nothing to count.
    counted = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=int(counted.total()),
        uncounted={name.removeprefix("aten::"): calls for name, calls in sorted(counted.unsupported_ops().items())},
        latency=measure_latency(network, image),
    )


def measure_latency(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Return the median milliseconds of network(image) by mode: eager, and on a GPU as a CUDA graph."""
    return _latency_cuda(network, image) if image.device.type == "cuda" else _latency_cpu(network, image)


def describe_machine(device: torch.device) -> str:
    """Return the device name and, for a CPU, the threads and load that affect its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]  # over the last minute; other programs slow the measurement down
    return (
        f"{processor()} ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}, load average {load:.1f}"
    )


def _latency_cpu(network: nn.Module, image: Tensor) -> dict[str, float]:
    times = []
    for _ in range(WARM_UP + REPEATS[image.device.type]):
        start = time.perf_counter()
        network(image)
        times.append(1000 * (time.perf_counter() - start))
    return {"eager": statistics.median(times[WARM_UP:])}


def _latency_cuda(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Time eager calls and CUDA graph replays, which exclude the Python overhead, with CUDA events."""
    call, repeats = functools.partial(network, image), REPEATS["cuda"]
    graph = capture_graph([call], WARM_UP)
    return {
        "eager": median_cuda_ms(call, repeats, WARM_UP),
        "CUDA graph": median_cuda_ms(graph.replay, repeats, WARM_UP),
    }
