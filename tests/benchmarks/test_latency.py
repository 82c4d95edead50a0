"""The latency benchmark measures networks that compute the same, at toy size on a CPU."""

import sys

import pytest
import torch
from torch import nn

from benchmarks import latency
from benchmarks.latency import fold_norms
from mgcc_dist.common.files import read_json
from mgcc_dist.models.blocks import MSAG, ConvMixerLayer, DoubleConv, UpConv

ROWS = ["eager", "mixed", "folded", "folded_phases", "folded_kernels"]


@pytest.fixture
def result(tmp_path, monkeypatch):
    """Run the program at a size; returns what it wrote."""

    def run(size, *widths):
        out = tmp_path / "latency.json"
        words = ["latency", "--out", str(out), "--size", str(size), "--widths", *map(str, widths)]
        monkeypatch.setattr(sys, "argv", words)
        latency.main()
        return read_json(out)

    return run


def test_every_row_states_latency_and_error_next_to_the_paper(result, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    content = result(16, 4, 8)
    assert content["paper"]["milliseconds"] == 32.07
    assert list(content["rows"]) == ROWS
    assert content["rows"].pop("folded_kernels") == {"not_run": "needs a CUDA device"}
    for row in content["rows"].values():
        assert row["eager_ms"] > 0
        assert row["relative_error"] < 0.05
    assert content["rows"]["eager"]["relative_error"] == 0


@torch.no_grad()
def test_folded_networks_have_no_norm_after_a_convolution_and_compute_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(DoubleConv(3, 4), UpConv(4, 16), MSAG(16), ConvMixerLayer(16, 3)).double().eval()
    for norm in (each for each in network.modules() if isinstance(each, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor, 0.5, 0.5)
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    expected = network(x)
    fold_norms(network, (DoubleConv, UpConv, MSAG), torch.float64)
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
    norms = [name for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)]
    assert norms == ["3.depthwise_norm", "3.pointwise_norm"]


@pytest.mark.gpu
def test_latency_on_a_gpu_is_also_that_of_one_cuda_graph(result):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for row in result(64, 16, 32, 64)["rows"].values():
        assert row["eager_ms"] > 0
        assert row["cuda_graph_ms"] > 0
        assert row["relative_error"] < 0.05
