"""Kernels compile ahead of time, and the check sees what it is there to see."""

import os

import pytest

pytest.importorskip("triton")

from mgcc_dist.kernels import compile as program

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def case(name):
    return program.all_cases()[name]


@compiles
@pytest.mark.parametrize("target", program.TARGETS)
def test_up_convolution_compiles_to_tensor_cores_without_spills_as_the_ledger_says(target):
    name = "upconv.evaluation bf16 128->64"
    entry = program.build(case(name), target)
    assert entry["vector_loads"] > 0
    before = program.read_ledger().get(name, {}).get(target, entry)  # another Triton has another ledger, or none yet
    assert program.problems(case(name), target, entry, before) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"registers": 108}, ""),
        ({"registers": 111}, "111 registers, in the ledger 100"),
        ({"spills": 3}, "spills"),
        ({"tensor_core": 0}, "tensor-core"),
        ({"shared_bytes": 65}, "65 bytes of shared memory"),
        ({"vector_loads": 3}, "3 vector loads"),
        ({"error": "no"}, "does not compile: no"),
    ],
)
def test_check_tells_a_spill_a_missing_tensor_core_and_a_regression(change, said):
    before = {"registers": 100, "stack_bytes": 0, "spills": 0, "shared_bytes": 64, "tensor_core": 8, "vector_loads": 4}
    found = program.problems(case("upconv.evaluation bf16 128->64"), "sm_90", before | change, before)
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_what_is_not_in_the_ledger_is_told():
    entry = {"registers": 1, "stack_bytes": 0, "spills": 0, "shared_bytes": 0, "tensor_core": 1, "vector_loads": 1}
    assert "--write" in program.problems(case("upconv.evaluation bf16 128->64"), "sm_90", entry, None)[0]
