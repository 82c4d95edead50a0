"""The programs that only the suite runs: environment, GPU tests, training run, precompilation."""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu_tests, training_run
from benchmarks.gpu_tests import marked_files
from benchmarks.precompile import compile_workload, small_workloads
from benchmarks.step import StepConfig
from benchmarks.train_step import COMBINATIONS, MIXED
from benchmarks.training_run import MODES, run_options, speeds
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json
from mgcc_dist.data.splits import locate_split
from mgcc_dist.kernels.operation import Workload
from mgcc_dist.methods.segment_config import SegmentConfig

SMALL = StepConfig(64, (8, 16), batch=4, steps=6, device="cpu", threads=1)
SPLIT = locate_split("busi_random_1")


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, capsys):
    out = tmp_path / "environment.json"
    (tmp_path / "broken_module.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["environment", "--out", str(out), "--modules", "json", "broken_module"])
    with pytest.raises(SystemExit, match="1"):
        environment.main()
    result = read_json(out)
    assert "import json" in result["rows"]
    assert "no_such_package" in result["not_importable"]["broken_module"]
    assert "broken_module cannot be imported" in capsys.readouterr().out
    assert result["environment"]["cores"] >= 1


def test_outcomes_of_gpu_tests_are_recorded(tmp_path, monkeypatch):
    out, file = tmp_path / "gpu_tests.json", tmp_path / "test_toy.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no GPU')\n"
    )
    words = ["gpu_tests", "--out", str(out), "--paths", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="1"):
        gpu_tests.main()
    result = read_json(out)
    counts = {key: value for key, value in result["rows"]["tests"].items() if key != "seconds"}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    reasons = {name.rpartition("::")[2]: test.get("reason", "") for name, test in result["tests"].items()}
    assert "assert 1 == 2" in reasons["test_bad"]
    assert "no GPU" in reasons["test_skipped"]


def test_files_of_gpu_tests_are_found_and_those_of_kernels_come_first():
    folder = Path(__file__).parents[1]
    files = [path.relative_to(folder).parts[0] for path in marked_files(folder, "gpu")]
    assert files[0] == "kernels"
    assert "kernels" not in files[files.count("kernels") :]
    assert len(files) > files.count("kernels")


def options_of(measured, seconds=1000.0, steps=None):
    words = run_options(SMALL, Path("shards"), SPLIT, measured, seconds, steps)
    return parse(SegmentConfig, [*words, "--out", "run"], CONFIGS / "segment", "mgcc_demo")


def test_the_training_run_takes_the_setting_with_which_most_steps_fit():
    half = {"eager": 5.0, MIXED: 10.0}
    assert options_of(half).loop.precision == "bf16"
    assert options_of(half).kernels == "auto"
    with_triton = options_of(half | {f"{MIXED} fused_kernels": 12.0})
    assert with_triton.kernels == "triton"
    compiled = half | {f"{MIXED} compile": 15.0}
    assert options_of(compiled).loop.compile == "default"
    assert options_of(compiled, seconds=200).loop.compile == "no"  # compilation would cost more than it saves
    assert options_of({"eager": 5.0}).loop.precision == "no"
    with pytest.raises(UserError, match="no row has the speed"):
        options_of({"tf32": 5.0})


def test_the_training_run_fits_into_the_time_and_has_at_most_300_epochs():
    slow, fast = options_of({MIXED: 1.0}), options_of({MIXED: 1000.0})
    assert 700 < slow.loop.steps < 1000  # validations take some of the 1000 seconds
    assert fast.loop.steps == 263 * 300 / 4
    assert fast.loop.validate_every == 15
    assert options_of({MIXED: 1.0}, seconds=1).loop.steps == 1
    assert options_of({MIXED: 1.0}, steps=4).loop.steps == 4
    assert slow.network.widths == SMALL.widths
    assert slow.data.image_size == SMALL.size


def test_modes_name_rows_of_the_benchmark():
    rows = {row.name for row in COMBINATIONS} | {"channels_last"}
    assert {name for mode in MODES for name in mode.rows} <= rows


def test_speeds_are_those_of_the_file_or_measured_if_it_is_of_another_size(tmp_path, monkeypatch):
    file = tmp_path / "train_step.json"
    rows = {"eager": {"steps_per_second": 2.0}, "tf32": {"not_run": "needs a CUDA device"}}
    file.write_text(json.dumps({"case": {"size": 64, "widths": [8, 16]}, "rows": rows}))
    monkeypatch.setattr(training_run, "measure_in_process", lambda row, config, limit: {"steps_per_second": 3.0})
    assert speeds(file, SMALL, 10) == {"eager": 2.0}
    assert speeds(tmp_path / "none.json", SMALL, 10) == {"channels_last": 3.0}
    file.write_text(json.dumps({"case": {"size": 256, "widths": [8, 16]}, "rows": rows}))
    assert speeds(file, SMALL, 10) == {"channels_last": 3.0}
    monkeypatch.setattr(training_run, "measure_in_process", lambda row, config, limit: {"not_run": "no memory"})
    with pytest.raises(UserError, match="no memory"):
        speeds(None, SMALL, 10)


def test_precompiled_kernels_are_in_the_cache_of_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    workload = Workload("upconv", (64, 16, 16, 64), 1, torch.bfloat16, training=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        row = pool.submit(compile_workload, workload, "sm_90").result()
    assert row["kernels"] >= 1
    assert len(list(tmp_path.rglob("*.cubin"))) == row["kernels"]


def test_workloads_to_precompile_are_small_and_distinct():
    workloads = small_workloads([torch.bfloat16])
    assert len(set(workloads)) == len(workloads)
    assert {each.op for each in workloads} == {"upconv", "msag", "convmixer", "mixer"}
    assert {each.shape[1:3] for each in workloads} == {(16, 16)}
