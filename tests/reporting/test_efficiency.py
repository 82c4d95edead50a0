"""Parameters, GMACs and latency: the paper's values, uncounted operations, and all output formats."""

import logging

import pytest
import torch
import yaml

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.report import TABLE_7, main
from mgcc_dist.reporting.efficiency_measure import build_row_network, describe_machine, measure_cost
from mgcc_dist.sweep.expansion import read_sweep

TINY = {"name": "mgcc", "widths": [2, 3, 4], "taps": [1, 2], "gates": [True, True, True], "kernel_size": 3}
CPU = torch.device("cpu")


def make_sweep(folder, **rows):
    path = folder / "costs.yaml"
    content = {"title": "Costs", "paper": "table_VII", "out": "o", "preset": "mgcc_busi", "seeds": []}
    path.write_text(yaml.safe_dump({**content, "rows": rows or {"MGCC": {"network": TINY}}}))
    return path


@pytest.mark.parametrize(
    ("row", "parameters", "gmacs"),
    [("U-Net", 34.53, 65.44), ("MGCC (w/o MSAG)", 44.47, 67.98), ("MGCC", 52.14, 91.67)],  # the paper: 91.66
)
def test_networks_of_table_vii_match_the_paper_s_parameters_and_gmacs(row, parameters, gmacs):
    # An eighth of the image size, for speed: all counted operations are proportional to the number of pixels.
    measured = measure_cost(build_row_network(read_sweep(TABLE_7), row), CPU, image_size=32)
    assert round(measured.parameters / 1e6, 2) == parameters
    assert round(measured.macs * 64 / 1e9, 2) == gmacs


def test_operations_that_fvcore_does_not_count_are_listed_without_warnings(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        measured = measure_cost(build_row_network(read_sweep(make_sweep(tmp_path)), "MGCC"), CPU, image_size=16)
    assert measured.uncounted["max_pool2d"] == 2
    assert measured.uncounted["gelu"] == 4
    assert "conv" not in "".join(measured.uncounted)
    assert not caplog.records


def test_program_prints_and_writes_the_table_with_the_machine_name(tmp_path, capsys):
    outs = [tmp_path / f"costs{suffix}" for suffix in (".html", ".md", ".tex", ".csv")]
    main(["--efficiency", str(make_sweep(tmp_path)), *(f"--out={out}" for out in outs)])
    printed = capsys.readouterr().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, _ = describe_machine(device).partition(", load average")
    assert name in printed
    assert "Not counted: MGCC: " in printed
    for out in outs:
        text = out.read_text()
        assert "52.14" in text
        assert "91.66" in text


def test_efficiency_table_needs_no_runs_and_writes_no_files_by_default(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--efficiency", str(make_sweep(tmp_path))])
    assert "report:" not in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["costs.yaml"]


def test_rows_with_other_keys_than_network_are_rejected(tmp_path):
    with pytest.raises(UserError, match="table_1: row 'U-Net' must have only network keys, got method, network, data"):
        main(["--efficiency", str(CONFIGS / "sweeps" / "table_1.yaml")])
    with pytest.raises(UserError, match="widthz"):
        main(["--efficiency", str(make_sweep(tmp_path, A={"network": {"widthz": [2]}}))])


@pytest.mark.gpu
def test_latency_on_a_gpu_is_measured_eagerly_and_as_a_cuda_graph(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network = build_row_network(read_sweep(make_sweep(tmp_path)), "MGCC")
    measured = measure_cost(network, torch.device("cuda"), image_size=64)
    assert measured.latency.keys() == {"eager", "CUDA graph"}
    assert all(ms > 0 for ms in measured.latency.values())
