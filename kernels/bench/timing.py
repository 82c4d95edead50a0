"""Clocks, and figures from them. Candidates take turns, so that what changes on the machine meets all of them."""

import statistics
import time
from collections.abc import Callable
from itertools import count

import torch

Call = Callable[[int], object]
"""does the work on input set i"""
Round = Callable[[], list[float]]
"""milliseconds of some calls"""
Clock = Callable[[Call, int], Round]
"""makes ready to time a call that has so many input sets"""

QUANTILES = (0.5, 0.2, 0.8)
GRAPH_CALLS = 20


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def take_turns(rounds: dict[str, Round], number: int) -> dict[str, list[list[float]]]:
    """Milliseconds of each candidate in each of `number` rounds; who begins changes from round to round."""
    times: dict[str, list[list[float]]] = {name: [] for name in rounds}
    names = list(rounds)
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(rounds[name]())
    return times


def figures(rounds: list[list[float]]) -> list[float]:
    """Median and the 20 and 80 % quantiles of all times."""
    times = [ms for one in rounds for ms in one]
    return [quantile(times, share) for share in QUANTILES]


def at_least(base: list[list[float]], other: list[list[float]]) -> float:
    """How many times as fast as `base` `other` was, at the least, in four rounds of five."""
    pairs = zip(base, other, strict=True)
    return quantile([statistics.median(slow) / statistics.median(fast) for slow, fast in pairs], 0.2)


def host(milliseconds: float) -> Clock:
    """Time on the CPU; a round takes about so long.

    With one thread it is the processor's time for this process, which other programs on the machine change little; with
    more it is the wall clock's.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def ready(call: Call, sets: int) -> Round:
        number = count()

        def one() -> float:
            began = now()
            call(next(number) % sets)
            return 1e3 * (now() - began)

        for _ in range(sets):
            one()  # what a first call sets up
        calls = min(max(int(milliseconds / max(one(), 1e-3)), 1), 200)
        return lambda: [one() for _ in range(calls)]

    return ready


def events(milliseconds: float) -> Clock:
    """Triton's do_bench: CUDA events around single calls, the L2 cache flushed before each."""
    from triton.testing import do_bench

    def ready(call: Call, sets: int) -> Round:
        number = count()

        def run() -> list[float]:
            return do_bench(lambda: call(next(number) % sets), warmup=5, rep=milliseconds, return_mode="all")

        return run

    return ready


def replay(milliseconds: float, cold: bool) -> Clock:
    """A CUDA graph of 20 calls or more: on input sets in turn, which together outgrow the L2 cache; or all on one."""

    def ready(call: Call, sets: int) -> Round:
        calls = max(GRAPH_CALLS, sets)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(max(sets, 3)):
                call(i % sets)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i % sets if cold else 0)

        def one() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls

        one()
        repeats = min(max(int(milliseconds / (calls * one())), 3), 50)
        return lambda: [one() for _ in range(repeats)]

    return ready


def clocks(device: torch.device, direction: str, milliseconds: float) -> dict[str, Clock]:
    """By name. Backward alone is not captured: it runs on the stream of its forward, which is outside the graph."""
    if device.type == "cpu":
        return {"processor_time" if torch.get_num_threads() == 1 else "wall": host(milliseconds)}
    graphs = {"graph_cold": replay(milliseconds, cold=True), "graph_warm": replay(milliseconds, cold=False)}
    return {"events_cold": events(milliseconds)} | (graphs if direction != "backward" else {})
