"""Kernels compile ahead of time with the resource usage of the ledger, and the check reports regressions."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from mgcc_dist.kernels import aot, targets
from mgcc_dist.kernels import compile as program
from mgcc_dist.kernels.compile import read_ledger
from tests.conftest import REPOSITORY

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
has_ledger = pytest.mark.skipif(not aot.ledger_path().is_file(), reason=f"{aot.ledger_path().name} does not exist")

SPEC = "upconv.evaluation bf16 128->64"
# One of each kind that compiles within seconds, and one for every target, seconds each;
# `python -m mgcc_dist.kernels.compile --check` compiles all for all.
SAMPLE = (
    ("convmixer.forward bf16 16x16 B8 k7", "sm_90"),
    ("msag.vote with gate bf16 C64", "sm_80"),
    ("msag.gate gradient sums bf16 C512", "sm_90"),
    *((SPEC, target) for target in targets.TARGETS),
)
USAGE = {"registers": 100, "stack_bytes": 0, "spills": 0, "shared_bytes": 64, "tensor_core": 8, "vector_loads": 4}


def problems(changes, ledger_entry=USAGE):
    return aot.problems(aot.all_specs("sm_90")[SPEC], "sm_90", USAGE | changes, ledger_entry)


@compiles
@has_ledger
@pytest.mark.parametrize(("name", "target"), SAMPLE)
def test_kernel_compiles_with_the_usage_of_the_ledger(name, target, tmp_path, monkeypatch):
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path))  # an empty cache, so that it compiles
    spec = aot.all_specs(target)[name]
    entry = aot.build(spec, target)
    assert aot.problems(spec, target, entry, aot.read_ledger()[name][target]) == []


@compiles
@pytest.mark.parametrize(
    "kernel",
    [
        *("forward", "forward first layer", "backward", "backward first layer", "norm forward", "norm backward"),
        *(
            f"{direction} stage {stage}" for direction in ("forward", "backward") for stage in (0, 1, 2)
        ),  # SyncBatchNorm
    ],
)
def test_triton_accepts_the_training_kernels_for_a_batch_of_one(kernel, tmp_path, monkeypatch):
    """Triton makes an integer argument of value 1 a compile-time constant, which its front end could reject."""

    class Accepted(Exception):
        pass

    def stop(*_):
        raise Accepted

    name = f"convmixer.{kernel} bf16 16x16 B8"
    spec = next(spec for each, spec in aot.all_specs("sm_90").items() if each in (name, f"{name} k7"))
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path))
    monkeypatch.setattr("triton.backends.nvidia.compiler.CUDABackend.make_ttgir", stop)  # follows the front end
    with pytest.raises(Accepted):
        aot.build(replace(spec, scalars=spec.scalars | {"B": 1}), "sm_90")


@compiles
def test_spills_are_counted_in_the_machine_code():
    spec = aot.all_specs("sm_80")[SPEC]
    large_tile = replace(spec, options={"num_warps": 1, "num_stages": 1})  # 256 accumulators per thread
    entry = aot.build(large_tile, "sm_80")
    assert "spills: expected 0" in "".join(aot.problems(large_tile, "sm_80", entry, None))


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_triton_and_3_6_have_a_ledger_of_every_kernel_without_spills(pinned):
    pins = dict(re.findall(r"^(\w+)==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    triton = pins["triton"] if pinned else "3.6.0"
    ledger = json.loads((aot.LEDGER_DIR / f"triton-{triton}.json").read_text())["kernels"]
    expected = {(name, target) for target in targets.supported_targets(triton) for name in aot.all_specs(target)}
    assert {(name, target) for name, entries in ledger.items() for target in entries} == expected
    for name, target in expected:
        assert aot.problems(aot.all_specs(target)[name], target, ledger[name][target], None) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"registers": 110}, None),
        ({"registers": 111}, "registers: was 100, now 111"),
        ({"spills": 3}, "spills: expected 0, got 3"),
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"tensor_core": 0}, "tensor_core: expected at least 1 instruction, got 0"),
        ({"shared_bytes": 65}, "shared_bytes: was 64, now 65"),
        ({"vector_loads": 3}, "vector_loads: was 4, now 3"),
    ],
)
def test_problems_are_spills_missing_tensor_cores_and_regressions(changes, message):
    found = problems(changes)
    assert len(found) == (message is not None)
    assert (message or "") in "".join(found)


def test_too_much_shared_memory_is_a_problem_without_a_ledger_entry():
    limit = targets.SHARED_BYTES["sm_90"]
    assert problems({"shared_bytes": limit}, ledger_entry=None) == []
    assert f"at most {limit}, got {limit + 1}" in problems({"shared_bytes": limit + 1}, ledger_entry=None)[0]


def test_ledger_is_read_back_and_a_missing_version_is_reported(tmp_path):
    aot.write_ledger({"b": {"sm_90": USAGE}, "a": {"sm_80": USAGE, "sm_90": USAGE}}, tmp_path / "ledger")
    assert aot.read_ledger(tmp_path / "ledger") == {"a": {"sm_80": USAGE, "sm_90": USAGE}, "b": {"sm_90": USAGE}}
    aot.ledger_path(tmp_path / "ledger").rename(tmp_path / "ledger" / "triton-1.2.3.json")
    with pytest.raises(FileNotFoundError, match=r"no ledger for this version \(existing: 1\.2\.3\).*--write"):
        aot.read_ledger(tmp_path / "ledger")


def test_compile_says_that_the_installed_triton_has_no_ledger(tmp_path, capsys):
    assert read_ledger(tmp_path, check=False, write=False) == {}
    assert "no ledger for this version (existing: none)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no ledger for this version"):
        read_ledger(tmp_path, check=True, write=False)


KERNEL = "msag.gate gradient sums bf16 C512"


@compiles
def test_write_then_check_fails_on_a_regression_and_an_unknown_kernel(tmp_path, monkeypatch, capsys):
    """Runs with a temporary ledger, so that the repository's stays unchanged, on a kernel that compiles quickly."""
    monkeypatch.setattr(aot, "TARGETS", ("sm_90",))
    monkeypatch.setattr("triton.knobs.cache.dir", "")  # which the program sets
    monkeypatch.setattr(program, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))

    def run(*options):
        folders = ("--cache", str(tmp_path / "cache"), "--ledger", str(tmp_path))
        with pytest.raises(SystemExit) as ended:
            program.main(["--only", KERNEL, "--jobs", "1", *folders, *options])
        return ended.value.code, "".join(capsys.readouterr())

    code, message = run("--write")
    assert code == 0, message
    assert "compile: 1/1" in message
    file = aot.ledger_path(tmp_path)
    written = json.loads(file.read_text())
    entry = written["kernels"][KERNEL]["sm_90"]
    better = entry | {"vector_loads": entry["vector_loads"] + 1}
    file.write_text(json.dumps({"kernels": {KERNEL: {"sm_90": better}, f"{KERNEL} gone": {}}}))
    code, message = run("--check")
    assert code == 1
    change = f"was {better['vector_loads']}, now {entry['vector_loads']}"
    assert f"{KERNEL}, sm_90, vector_loads: {change}" in message
    assert f"{KERNEL} gone: in the ledger, but there is no such kernel" in message
    assert "compile: 1 compiled, 2 problems" in message


def test_gpu_outside_the_targets_is_unsupported(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "sm_75" in targets.unsupported_device_reason(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert targets.unsupported_device_reason(device) is None


@pytest.mark.parametrize("program", ["mgcc_dist.kernels.compile", "mgcc_dist.bench"])
def test_help_imports_neither_torch_nor_triton(program):
    command = [sys.executable, "-X", "importtime", "-m", program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "triton", "numpy", "matplotlib"}
