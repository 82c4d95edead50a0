"""The model of a training step counts what the step computes, and lists measured times next to its predictions."""

import json

import pytest

from benchmarks.roofline_step import (
    GPU,
    GPUS,
    LIBRARY_SHARE,
    MEMORY_SHARE,
    MIXED,
    SETTINGS,
    Cost,
    Setting,
    convolutions,
    costs_of,
    measured_steps,
    predict,
    table,
    trace,
)
from mgcc_dist.models.config import MGCCConfig

PHASE = next(setting for setting in SETTINGS if setting.fused == ("upconv",))


CONFIG = MGCCConfig(in_channels=1, widths=(16, 32), taps=(1,), gates=(True, False), kernel_size=3)


def test_convolutions_are_counted_by_part():
    """The table of docs/explanation/performance.md."""
    cells = [line.split(" | ") for line in convolutions()[2:]]
    assert [row[1] for row in cells] == ["0.272", "0.041", "1.512", "1.237", "1.856", "4.917"]
    assert cells[-1][3] == "3.86 GB |"


@pytest.fixture(scope="module")
def parts():
    return trace(images=2, size=32, config=CONFIG)


def flops(costs, operation):
    return sum(cost.flops for cost in costs if cost.operation == operation)


def test_backward_of_convolutions_takes_twice_the_forward_except_for_the_first_layer(parts):
    costs = [cost for part in parts for cost in part.costs]
    forward, backward = flops(costs, "convolution"), flops(costs, "convolution_backward")
    assert 2 * forward - backward == 2 * (2 * 32 * 32) * 16 * 1 * 9  # images have no gradient


def test_parts_are_the_fusible_modules_and_the_rest(parts):
    assert sorted(part.operation for part in parts) == ["", "mixer", "msag", "upconv", "upconv"]
    (gate,) = [part for part in parts if part.operation == "msag"]
    assert gate.shape == (16, 32, 32)
    assert flops(gate.costs, "convolution") == 44 * 2 * 32 * 32 * 16**2
    (mixer,) = [part for part in parts if part.operation == "mixer"]
    assert mixer.shape == (32, 16, 16, 3, 1)
    assert flops(mixer.costs, "convolution") == 2 * 2 * 16 * 16 * 32 * (3 * 3 + 32)


def test_only_convolutions_without_a_norm_add_their_bias(parts):
    def calls(parts, operation):
        return sum(cost.operation == operation for part in parts for cost in part.costs)

    with_biases = trace(images=2, size=32, config=CONFIG, added_biases=True)
    for operation in ("bias of a convolution", "bias of a convolution, backward"):
        assert calls(parts, operation) == 2 + 2  # of the heads of two decoders, and of the mixer's layer
        assert calls(with_biases, operation) == calls(parts, "convolution")


def test_phase_convolutions_take_16_of_36_products_and_no_upsampling(parts):
    part = next(part for part in parts if part.operation == "upconv")
    ours = costs_of(part, PHASE)
    assert flops(ours, "convolution") == pytest.approx(flops(part.costs, "convolution") * 16 / 36)
    assert any("upsample" in cost.operation for cost in part.costs)
    assert not any("upsample" in cost.operation for cost in ours)


def test_time_is_the_larger_of_products_and_bytes(parts):
    gpu = GPU(teraflops=100, terabytes=1)
    products, passes = Cost("convolution", 1e12, 1e9), Cost("add", 0.0, 1e9)
    assert products.seconds(gpu, compiled=True) == pytest.approx(1e12 / (100e12 * LIBRARY_SHARE))
    assert passes.seconds(gpu, compiled=False) == pytest.approx(1e9 / (1e12 * MEMORY_SHARE))
    assert passes.seconds(gpu, compiled=True) == passes.seconds(gpu, compiled=False) / 2
    milliseconds, rows = predict({True: parts}, SETTINGS[0], GPUS["H100"])
    assert milliseconds == pytest.approx(sum(row["ms"] for row in rows.values()), rel=1e-2)


def test_measured_times_stand_next_to_predictions(parts, tmp_path):
    content = {"device": "NVIDIA H100 80GB HBM3", "case": {"size": 256, "batch": 4}}
    rows = {MIXED: {"steps_per_second": 10.0}, "eager": {"not_run": "out of time"}}
    (tmp_path / "train_step.json").write_text(json.dumps(content | {"rows": rows}))
    (tmp_path / "other.json").write_text(json.dumps(content | {"case": {"size": 128, "batch": 4}, "rows": rows}))
    measured = measured_steps(tmp_path)
    assert measured == {("H100", MIXED): 100.0}
    lines = list(table({True: parts, False: parts}, measured))
    assert len(lines) == 2 + len(SETTINGS)
    assert "(measured 100.0)" in lines[2 + SETTINGS.index(Setting(MIXED))]
