"""Which ranks are named as slow, where the report and the status say so, and NVTX ranges."""

import json
import time

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mgcc_dist.reporting.page import _speed
from mgcc_dist.reporting.runs import Run
from mgcc_dist.slurm.status import held_up, latest_timed_row
from mgcc_dist.train.profiling import _name_forward_passes
from mgcc_dist.train.step_times import StepTimes
from mgcc_dist.train.stragglers import named_ranks, slow_rank, slowest_ranks


def test_the_five_slowest_of_many_ranks_are_named():
    by_rank = [(0.1 * (rank % 7 == 3), 0.4 + 1e-6 * rank) for rank in range(1000)]
    found = slowest_ranks(by_rank, step_seconds=1.0)
    assert [each["rank"] for each in found["slowest"]] == [997, 990, 983, 976, 969]
    assert found["slowest"][0] == {"rank": 997, "seconds": 0.500997, "data_seconds": 0.1}
    assert found["median_seconds"] == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("seconds", "step", "is_slow"),
    [
        ((0.4, 0.4, 0.8), 1.0, True),
        ((0.4, 0.8), 1.0, True),  # of two ranks the other one is the median
        ((0.4, 0.4, 0.5), 1.0, False),  # a quarter more
        ((0.004, 0.004, 0.02), 1.0, False),  # nobody waits for long
        ((0.4, 0.4), 1.0, False),
    ],
)
def test_a_rank_is_slow_if_the_others_wait_for_a_good_part_of_the_step(seconds, step, is_slow):
    found = slowest_ranks([(0.0, each) for each in seconds], step)
    assert (slow_rank(found) is not None) == is_slow


def rows_with_a_slow_rank(count):
    found = slowest_ranks([(0.0, 0.4), (0.3, 0.5)], 1.0)
    found["slowest"][0]["host"] = "n2"
    row = {"epoch": 0.1, "split": "train", "images_per_second": 50.0, "mfu": 0.25, "seconds": 1.0, "stragglers": found}
    return [{"step": 10 * i, **row} for i in range(1, count + 1)]


def test_status_names_the_rank_that_the_others_wait_for(tmp_path):
    assert held_up(latest_timed_row(tmp_path)) == ""
    lines = [*map(json.dumps, rows_with_a_slow_rank(2)), '{"step": 20, "split": "validation"}', '{"step": 30, "se']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = "slow: rank 1 (n2) needs 0.8 s per step for data (0.3 s) and forward pass, the median is 0.4 s"
    assert held_up(latest_timed_row(tmp_path)) == text


def test_the_report_says_how_often_a_rank_was_slow(tmp_path):
    rows = [*rows_with_a_slow_rank(3), {"step": 40, "split": "train", "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        _speed(Run(tmp_path, "run", {}, {}))
        == "50 images per second; model FLOP utilisation 25.0%; rank 1 (n2) was slow in 3 of 3 rows"
    )
    assert _speed(Run(tmp_path / "other", "run", {}, {})) == ""


def test_a_rank_that_stays_slow_is_warned_of_once(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    module = nn.Linear(1, 1)
    times = StepTimes("toy", tmp_path, module, module, 2, 1, True, accelerator)
    times._ranks, times._totals = 2, [(0.0, 0.0)] * 2
    warned = []
    for by_rank in ([[0, 1], [0, 9]], [[0, 9], [0, 1]], [[0, 1], [0, 9]], [[0, 1], [0, 9]], [[0, 1], [0, 9]]):
        with times.waiting_for_data():
            pass
        times.row(by_rank)
        warned.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    assert warned[:3] == [[], [], []]  # in two rows in a row
    [text] = warned[3]
    assert text.startswith(
        "toy: rank 1 needs 9 s per step for data (0 s) and forward pass, the median is 1 s. The other"
    )
    assert warned[4] == []


@pytest.mark.parametrize(("seconds", "named"), [((1.0, 1.03, 0.98), []), ((1.0, 1.2, 0.98, 1.05), [1])])
def test_the_end_of_the_log_names_no_rank_for_a_few_percent(seconds, named):
    assert [rank["rank"] for rank in named_ranks(slowest_ranks([[0.0, each] for each in seconds], 0.0))] == named


def test_speed_leaves_out_pauses_and_what_other_ranks_need(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    module = nn.Linear(1, 1)
    with StepTimes("toy", tmp_path, module, module, 3, 2, True, Accelerator(cpu=True)) as times:
        hook = module.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.5), prepend=True)
        for _ in range(4):  # two steps of two batches
            with times.waiting_for_data():
                clock[0] += 1
            module(torch.zeros(1))
            clock[0] += 2  # backward
        with times.paused():
            clock[0] += 1000
        module.eval()(torch.zeros(1))
        assert times.per_step() == [2.0, 1.0]
        assert times.row([times.per_step()])[0] == {"images_per_second": round(12 / 14.5, 3), "data_seconds": 2.0}
        assert times._data == times._batches == 0
    hook.remove()
    assert not module._forward_hooks


def test_nvtx_ranges_have_the_names_of_the_trace_and_nest_like_the_modules(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    module = nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity())
    for nvtx in (False, True):
        hooks = _name_forward_passes(module, nvtx)
        module(torch.zeros(1))
        for hook in hooks:
            hook.remove()
    assert calls == ["0", "0.0", "pop", "pop", "1", "pop"]
