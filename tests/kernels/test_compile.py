"""Kernels compile ahead of time as the ledger says, and the check sees what it is there to see."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from mgcc_dist.kernels import compile as program
from mgcc_dist.kernels import targets

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

FORM = "upconv.evaluation bf16 128->64"
# One of each kind that compiles within seconds: all forms are `python -m mgcc_dist.kernels.compile --check`.
SAMPLE = (FORM, "convmixer.forward bf16 16x16 B8 k7", "msag.vote with gate bf16 C64", "msag.gate sums bf16 C512")
FIGURES = {"registers": 100, "stack_bytes": 0, "spills": 0, "shared_bytes": 64, "tensor_core": 8, "vector_loads": 4}


def problems(changes, before=FIGURES):
    return program.problems(program.all_cases("sm_90")[FORM], "sm_90", FIGURES | changes, before)


@compiles
@pytest.mark.skipif(not program.LEDGER.is_file(), reason=f"{program.LEDGER.name} is not there: another Triton")
@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("form", SAMPLE)
def test_form_compiles_as_the_ledger_says(form, target, tmp_path, monkeypatch):
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path))  # so that it does compile
    case = program.all_cases(target)[form]
    entry = program.build(case, target)
    assert program.problems(case, target, entry, program.read_ledger()[form][target]) == []


@compiles
@pytest.mark.parametrize("kernel", ["forward", "forward of a first layer", "backward", "backward of a first layer"])
def test_training_kernels_compile_for_a_batch_of_one(kernel):
    """Triton makes an integer argument of value 1 a compile-time constant."""
    case = program.all_cases("sm_90")[f"convmixer.{kernel} bf16 16x16 B8 k7"]
    program.build(replace(case, scalars=case.scalars | {"B": 1}), "sm_90")


@compiles
def test_spill_is_seen_in_machine_code():
    case = program.all_cases("sm_80")[FORM]
    crowded = replace(case, options={"num_warps": 1, "num_stages": 1})  # 256 accumulators a thread
    entry = program.build(crowded, "sm_80")
    assert "spills: must be 0" in "".join(program.problems(crowded, "sm_80", entry, None))


@pytest.mark.skipif(not program.LEDGER.is_file(), reason=f"{program.LEDGER.name} is not there: another Triton")
def test_ledger_holds_every_form_of_every_target_and_nothing_that_spills():
    ledger = program.read_ledger()
    forms = {(name, target) for target in targets.TARGETS for name in program.all_cases(target)}
    assert {(name, target) for name, entries in ledger.items() for target in entries} == forms
    for name, target in forms:
        assert program.problems(program.all_cases(target)[name], target, ledger[name][target], None) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"registers": 110}, None),
        ({"registers": 111}, "registers: was 100, is 111"),
        ({"spills": 3}, "spills: must be 0, is 3"),
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"tensor_core": 0}, "tensor_core: must be there, is 0"),
        ({"shared_bytes": 65}, "shared_bytes: was 64, is 65"),
        ({"vector_loads": 3}, "vector_loads: was 4, is 3"),
    ],
)
def test_check_tells_a_spill_a_missing_tensor_core_and_a_regression(changes, said):
    found = problems(changes)
    assert len(found) == (said is not None)
    assert (said or "") in "".join(found)


def test_more_shared_memory_than_a_program_may_have_is_told_without_a_ledger():
    limit = targets.SHARED_BYTES["sm_90"]
    assert problems({"shared_bytes": limit}, before=None) == []
    assert f"at most {limit}, is {limit + 1}" in problems({"shared_bytes": limit + 1}, before=None)[0]


@pytest.fixture
def ledgers(tmp_path, monkeypatch):
    """A folder of ledgers for the test alone."""
    monkeypatch.setattr(program, "LEDGERS", tmp_path)
    monkeypatch.setattr(program, "LEDGER", tmp_path / f"triton-{program.triton.__version__}.json")
    return tmp_path


def test_written_ledger_is_read_back_and_another_version_s_absence_is_told(ledgers):
    program.write_ledger({"b": {"sm_90": FIGURES}, "a": {"sm_80": FIGURES, "sm_90": FIGURES}})
    assert program.read_ledger() == {"a": {"sm_80": FIGURES, "sm_90": FIGURES}, "b": {"sm_90": FIGURES}}
    program.LEDGER.rename(ledgers / "triton-1.2.3.json")
    with pytest.raises(FileNotFoundError, match=r"has no ledger \(there are: 1\.2\.3\).*--write"):
        program.read_ledger()


@compiles
def test_program_writes_checks_and_fails_on_a_worse_figure(tmp_path):
    """On a copy of the package, so that the ledger here stays."""
    launcher = tmp_path / "run.py"
    launcher.write_text(
        "import sys, pathlib\n"
        "from mgcc_dist.kernels import compile as program\n"
        f"program.LEDGERS = pathlib.Path({str(tmp_path)!r})\n"
        "program.LEDGER = program.LEDGERS / 'triton-here.json'\n"
        "program.TARGETS = ('sm_90',)\n"
        "if __name__ == '__main__':\n    program.main()\n"
    )

    def run(*words):
        words = ("--only", "msag.gate bf16 C64", "--jobs", "1", "--cache", str(tmp_path / "cache"), *words)
        done = subprocess.run([sys.executable, launcher, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run("--write")
    assert code == 0, said
    assert "compile: 1/1" in said
    file = tmp_path / "triton-here.json"
    written = json.loads(file.read_text())
    entry = written["forms"]["msag.gate bf16 C64"]["sm_90"]
    better = entry | {"vector_loads": entry["vector_loads"] + 1}
    file.write_text(json.dumps({"forms": {"msag.gate bf16 C64": {"sm_90": better}, "msag.gate bf16 C64 gone": {}}}))
    code, said = run("--check")
    assert code == 1
    assert f"msag.gate bf16 C64, sm_90, vector_loads: was {better['vector_loads']}, is {entry['vector_loads']}" in said
    assert "msag.gate bf16 C64 gone is in the ledger, but no such form" in said
    assert "compile: 1 compiled, 2 problems" in said


def test_a_gpu_without_a_ledger_column_is_refused(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "sm_75" in targets.device_refusal(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert targets.device_refusal(device) is None
