"""What a prediction costs: the paper's figures, what is not counted, in every format."""

import logging

import pytest
import torch
import yaml

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.report import TABLE_7, main
from mgcc_dist.reporting.efficiency import cost, machine, network_of

TINY = {"name": "mgcc", "widths": [2, 3, 4], "taps": [1, 2], "gates": [True, True, True], "kernel_size": 3}
CPU = torch.device("cpu")


def make_sweep(folder, **rows):
    path = folder / "costs.yaml"
    content = {"title": "Costs", "paper": "table_VII", "out": "o", "preset": "mgcc_busi", "seeds": []}
    path.write_text(yaml.safe_dump({**content, "rows": rows or {"MGCC": {"network": TINY}}}))
    return path


@pytest.mark.parametrize(
    ("row", "parameters", "gmacs"),
    [("U-Net", 34.53, 65.44), ("MGCC (w/o MSAG)", 44.47, 67.98), ("MGCC", 52.14, 91.67)],  # the paper cuts to 91.66
)
def test_networks_of_table_vii_cost_what_the_paper_says(row, parameters, gmacs):
    # At an eighth of the side, for speed: every counted operation is proportional to the number of pixels.
    measured = cost(network_of(read_sweep(TABLE_7), row), CPU, image_size=32)
    assert round(measured.parameters / 1e6, 2) == parameters
    assert round(measured.macs * 64 / 1e9, 2) == gmacs


def test_what_fvcore_does_not_count_is_said_and_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        measured = cost(network_of(read_sweep(make_sweep(tmp_path)), "MGCC"), CPU, image_size=16)
    assert measured.uncounted["max_pool2d"] == 2
    assert measured.uncounted["gelu"] == 4
    assert "conv" not in "".join(measured.uncounted)
    assert not caplog.records


def test_program_prints_and_writes_the_table_with_the_machine_named(tmp_path, capsys):
    outs = [tmp_path / f"costs{suffix}" for suffix in (".html", ".md", ".tex", ".csv")]
    main(["--efficiency", str(make_sweep(tmp_path)), *(f"--out={out}" for out in outs)])
    printed = capsys.readouterr().out
    name, _, _ = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")).partition(", load average")
    assert name in printed
    assert "Not counted: MGCC: " in printed
    for out in outs:
        text = out.read_text()
        assert "52.14" in text
        assert "91.66" in text


def test_a_table_of_costs_needs_no_run_and_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--efficiency", str(make_sweep(tmp_path))])
    assert "report:" not in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["costs.yaml"]


def test_rows_that_are_no_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match="table_1: row 'U-Net' must have network keys alone, got method, network, data"):
        main(["--efficiency", str(CONFIGS / "sweeps" / "table_1.yaml")])
    with pytest.raises(UserError, match="widthz"):
        main(["--efficiency", str(make_sweep(tmp_path, A={"network": {"widthz": [2]}}))])


@pytest.mark.gpu
def test_latency_on_a_gpu_is_measured_eagerly_and_as_a_graph(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network = network_of(read_sweep(make_sweep(tmp_path)), "MGCC")
    measured = cost(network, torch.device("cuda"), image_size=64)
    assert measured.latency.keys() == {"eager", "CUDA graph"}
    assert all(ms > 0 for ms in measured.latency.values())
