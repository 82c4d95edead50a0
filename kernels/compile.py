"""Compile the Triton kernels ahead of time for GPUs that are not here, and hold what comes out to a ledger.

    python -m mgcc_dist.kernels.compile            # what each case takes, as a table
    python -m mgcc_dist.kernels.compile --check    # exit 1 on a spill, a missing tensor-core instruction, a regression
    python -m mgcc_dist.kernels.compile --write    # save as ledger/triton-VERSION.json

The cases are those of each kernel file's `cases()`; the targets sm_80, sm_90, sm_100 and gfx942. Triton's wheel has all
tools. Registers move from one Triton to the next, so each version has its own ledger. A regression is more than
`REGISTERS` times the ledger's registers, or any more shared memory or fewer vector loads.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from json import dumps, loads
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mgcc_dist.kernels.case import Case

FILES = ("upconv_kernel", "convmixer", "msag")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LEDGER = Path(__file__).parent / "ledger" / f"triton-{triton.__version__}.json"
REGISTERS = 1.1
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Entry = dict[str, Any]
"""registers, stack_bytes, spills (instructions that store or load one), shared_bytes, tensor_core (instructions),
vector_loads (of 16 bytes); or error"""


@cache
def all_cases() -> dict[str, Case]:
    """By name, of every kernel file that is there."""
    files = [f"mgcc_dist.kernels.{name}" for name in FILES]
    found = [case for file in files if find_spec(file) for case in import_module(file).cases()]
    return {case.name: case for case in found}


def build(case: Case, target: str) -> Entry:
    """Compile `case` for `target` and read what its machine code takes."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    aligned = [["tt.divisibility", 16]]  # torch's memory is, and the JIT sees it
    attributes = {(i,): aligned for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(case.options))
    read = _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amdgcn(compiled.asm["amdgcn"])
    return {**read, "shared_bytes": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> Entry:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *words, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *words in (("cuobjdump", "-res-usage"), ("nvdisasm",))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", code)),
        "vector_loads": len(re.findall(r"\b(?:LDG\.E\.128|LDGSTS\.E\.(?:\w+\.)*128)", code)),
    }


def _read_amdgcn(code: str) -> Entry:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "tensor_core": len(re.findall(r"\bv_mfma", code)),
        "vector_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code)),
    }


def problems(case: Case, target: str, entry: Entry, before: Entry | None) -> list[str]:
    """What is wrong with `entry`; `before` is the ledger's."""
    if "error" in entry:
        return [f"does not compile: {entry['error']}"]
    found = []
    if entry["spills"]:
        found.append(f"spills registers ({entry['spills']} instructions, {entry['stack_bytes']} bytes of stack)")
    if case.tensor_cores and not entry["tensor_core"]:
        found.append("has no tensor-core instruction")
    if before is None:
        return [*found, "is not in the ledger; run --write"]
    if "error" in before:
        return found
    if entry["registers"] > REGISTERS * before["registers"]:
        found.append(f"takes {entry['registers']} registers, in the ledger {before['registers']}")
    if entry["shared_bytes"] > before["shared_bytes"]:
        found.append(f"takes {entry['shared_bytes']} bytes of shared memory, in the ledger {before['shared_bytes']}")
    if entry["vector_loads"] < before["vector_loads"]:
        found.append(f"has {entry['vector_loads']} vector loads, in the ledger {before['vector_loads']}")
    return found


def read_ledger() -> dict[str, dict[str, Entry]]:
    """Case -> target -> entry, of this version of Triton; empty where there is no ledger of it."""
    return loads(LEDGER.read_text(encoding="utf-8"))["cases"] if LEDGER.is_file() else {}


def _build_named(job: tuple[str, str]) -> Entry:
    name, target = job
    try:
        return build(all_cases()[name], target)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if anything is wrong")
    parser.add_argument("--write", action="store_true", help=f"save as {LEDGER.name}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and under the interpreter nothing is compiled; unset it")
    jobs = list(product((name for name in all_cases() if options.only in name), TARGETS))
    if not jobs:
        parser.error(f"no case has {options.only!r} in its name; there are {', '.join(all_cases())}")

    ledger, entries, wrong = read_ledger(), dict[str, dict[str, Entry]](), 0
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for (name, target), entry in zip(jobs, pool.map(_build_named, jobs), strict=True):
            entries.setdefault(name, {})[target] = entry
            before = entry if options.write else ledger.get(name, {}).get(target)
            said = problems(all_cases()[name], target, entry, before)
            wrong += len(said)
            facts = " ".join(f"{key} {value}" for key, value in entry.items() if key != "error")
            print(f"{name:44} {target:7} {facts}", *(f"\n    WRONG: {problem}" for problem in said), flush=True)
    if options.write:
        LEDGER.parent.mkdir(exist_ok=True)
        kept = {name: entry for name, entry in ledger.items() if name in all_cases()}
        text = dumps({"triton": triton.__version__, "cases": dict(sorted((kept | entries).items()))}, indent=1)
        LEDGER.write_text(text + "\n", encoding="utf-8")
        print(f"compile: {LEDGER}")
    print(f"compile: {len(jobs)} compiled, {wrong} problems")
    sys.exit(1 if options.check and wrong else 0)


if __name__ == "__main__":
    main()
