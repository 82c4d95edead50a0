"""Timers and statistics of times. Implementations are timed in alternation, so that load affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch

Call = Callable[[int], object]
"""runs the workload on input set i"""
Round = Callable[[], list[float]]
"""returns the milliseconds of several calls"""
Timer = Callable[[Call, int], Round]
"""prepares the timing of a call that has this many input sets"""

QUANTILES = (0.5, 0.2, 0.8)
GRAPH_CALLS = 20
DECIDING = "graph_cold"
"""the GPU timer by which "auto" decides: a step that keeps the GPU busy hides the launches of its kernels"""


def quantile(values: list[float], share: float) -> float:
    """Return the value below which the `share` of `values` lies, by linear interpolation."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def alternate(rounds: dict[str, Round], number: int) -> dict[str, list[list[float]]]:
    """Run `number` rounds of each timer in alternation, each time starting with another one. Returns milliseconds."""
    times: dict[str, list[list[float]]] = {name: [] for name in rounds}
    names = list(rounds)
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(rounds[name]())
    return times


def median_and_quantiles(rounds: list[list[float]]) -> list[float]:
    """Return the median and the 20% and 80% quantiles of all times."""
    times = [ms for one in rounds for ms in one]
    return [quantile(times, share) for share in QUANTILES]


def conservative_speedup(baseline: list[list[float]], other: list[list[float]]) -> float:
    """Return the speedup of `other` over `baseline` that four rounds of five reach."""
    pairs = zip(baseline, other, strict=True)
    return quantile([statistics.median(slow) / statistics.median(fast) for slow, fast in pairs], 0.2)


def cpu_timer(milliseconds: float) -> Timer:
    """Time on the CPU, with rounds of about `milliseconds`.

    With one thread this is the CPU time of the process, which other programs hardly affect; with more it is wall time.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def prepare(call: Call, sets: int) -> Round:
        number = count()

        def one() -> float:
            start = now()
            call(next(number) % sets)
            return 1e3 * (now() - start)

        for _ in range(sets):
            one()  # warm-up
        calls = min(max(int(milliseconds / max(one(), 1e-3)), 1), 200)
        return lambda: [one() for _ in range(calls)]

    return prepare


def cuda_event_timer(milliseconds: float) -> Timer:
    """Time single calls by CUDA events with Triton's do_bench, which flushes the L2 cache before each call."""
    from triton.testing import do_bench

    def prepare(call: Call, sets: int) -> Round:
        number = count()

        def run() -> list[float]:
            return do_bench(lambda: call(next(number) % sets), warmup=5, rep=milliseconds, return_mode="all")

        return run

    return prepare


def capture_graph(calls: Sequence[Callable[[], object]], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Capture `calls` in one CUDA graph, after running the first `warm_up` of them (cyclically) on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(warm_up):
            calls[i % len(calls)]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def elapsed_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds between CUDA events before and after `call`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_cuda_ms(call: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Return the median milliseconds of `call` between CUDA events, after `warm_up` calls that do not count."""
    return statistics.median([elapsed_ms(call) for _ in range(warm_up + repeats)][warm_up:])


def cuda_graph_timer(milliseconds: float, cold: bool) -> Timer:
    """Time the replay of a CUDA graph of at least 20 calls.

    With `cold`, the calls alternate between input sets that together exceed the L2 cache; otherwise all use the first.
    """

    def prepare(call: Call, sets: int) -> Round:
        calls = [partial(call, i % sets if cold else 0) for i in range(max(GRAPH_CALLS, sets))]
        graph = capture_graph(calls, warm_up=max(sets, 3))

        def one() -> float:
            return elapsed_ms(graph.replay) / len(calls)

        one()
        repeats = min(max(int(milliseconds / (len(calls) * one())), 3), 50)
        return lambda: [one() for _ in range(repeats)]

    return prepare


def timers(device: torch.device, direction: str, milliseconds: float) -> dict[str, Timer]:
    """Return the timers by name.

    The backward by itself is not captured: it runs on the stream of its forward, which is outside the graph.
    """
    if device.type == "cpu":
        return {"processor_time" if torch.get_num_threads() == 1 else "wall": cpu_timer(milliseconds)}
    graphs = {
        DECIDING: cuda_graph_timer(milliseconds, cold=True),
        "graph_warm": cuda_graph_timer(milliseconds, cold=False),
    }
    return {"events_cold": cuda_event_timer(milliseconds)} | (graphs if direction != "backward" else {})
