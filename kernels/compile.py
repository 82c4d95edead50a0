"""Compile the Triton kernels ahead of time for GPUs that are not here, and hold what comes out to a ledger.

    python -m mgcc_dist.kernels.compile            # what each form takes, as a table
    python -m mgcc_dist.kernels.compile --check    # exit 1 on a spill, a missing tensor-core instruction, a regression
    python -m mgcc_dist.kernels.compile --write    # save as ledger/triton-VERSION.json, if nothing is wrong

The forms are those of each kernel file's `cases()`, in bfloat16 at the paper's sizes, as Triton would compile them when
they are launched, for each of targets.py. Triton's wheel has all tools. Registers move from one Triton to the next, so
each version has its own ledger, and a version without one is not checked but told. A regression is more than
`REGISTERS` times the ledger's registers, or any more shared memory or fewer vector loads.

All is compiled in processes, into a cache in --cache that is Triton's own: it knows a form by its source, constants,
options and compiler, so a run that was interrupted goes on, and what has not changed is only read again.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib import import_module
from json import dumps, loads
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.targets import SHARED_BYTES, TARGETS

FILES = ("upconv_kernel", "convmixer", "msag")
LEDGERS = Path(__file__).parent / "ledger"
LEDGER = LEDGERS / f"triton-{triton.__version__}.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgcc-dist" / f"triton-{triton.__version__}"
REGISTERS = 1.1
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Entry = dict[str, int]
"""registers, stack_bytes, spills (instructions that store or load one; on AMD registers), shared_bytes, tensor_core
(instructions), vector_loads (of 16 bytes)"""
Ledger = dict[str, dict[str, Entry]]
"""form -> target -> entry"""


@cache
def all_cases(target: str) -> dict[str, Case]:
    """The forms for `target`, by name."""
    return {case.name: case for file in FILES for case in import_module(f"mgcc_dist.kernels.{file}").cases(target)}


def build(case: Case, target: str) -> Entry:
    """Compile `case` for `target` and read what its machine code takes."""
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    backend = make_backend(gpu)
    names = case.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = case.scalars.get(name)
        if name in case.constants or value == 1:
            signature[name], constants[place,] = "constexpr", case.constants.get(name, value)
        elif value is None:
            signature[name] = case.pointers[name]
            attributes[place,] = backend.parse_attr("DS")  # torch's memory is aligned, and here no tensor has 2 GB
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[place,] = backend.parse_attr("D")
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu, options=dict(case.options))
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
    """What is wrong with `entry`; `before` is the ledger's, None to look at `entry` alone."""
    found = []
    if entry["spills"] or entry["stack_bytes"]:
        found.append(f"spills: must be 0, is {entry['spills']} ({entry['stack_bytes']} bytes of stack)")
    if case.tensor_cores and not entry["tensor_core"]:
        found.append("tensor_core: must be there, is 0")
    if entry["shared_bytes"] > SHARED_BYTES[target]:
        found.append(f"shared_bytes: must be at most {SHARED_BYTES[target]}, is {entry['shared_bytes']}")
    if before is None:
        return found
    for figure, worse in (
        ("registers", entry["registers"] > REGISTERS * before["registers"]),
        ("shared_bytes", entry["shared_bytes"] > before["shared_bytes"]),
        ("vector_loads", entry["vector_loads"] < before["vector_loads"]),
    ):
        if worse:
            found.append(f"{figure}: was {before[figure]}, is {entry[figure]}")
    return found


def read_ledger() -> Ledger:
    """That of this version of Triton. FileNotFoundError, with what to do, where there is none."""
    if not LEDGER.is_file():
        there = ", ".join(sorted(path.stem.removeprefix("triton-") for path in LEDGERS.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"triton {triton.__version__} has no ledger (there are: {there}); install one of these versions, "
            "or run `python -m mgcc_dist.kernels.compile --write` and look at what changed"
        )
    return loads(LEDGER.read_text(encoding="utf-8"))["forms"]


def write_ledger(forms: Ledger) -> None:
    """A line a form and target, so that a difference can be read."""
    LEDGERS.mkdir(exist_ok=True)
    blocks = []
    for name, entries in sorted(forms.items()):
        lines = ",\n".join(f"  {dumps(target)}: {dumps(entries[target])}" for target in TARGETS if target in entries)
        blocks.append(f" {dumps(name)}: {{\n{lines}\n }}")
    text = f'{{"triton": {dumps(triton.__version__)}, "forms": {{\n' + ",\n".join(blocks) + "\n}}\n"
    scratch = LEDGER.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(LEDGER)


def _compile_into(cache_folder: str) -> None:
    triton.knobs.cache.dir = cache_folder


def _build_named(name: str, target: str) -> Entry | str:
    """What it takes, or why it can't be compiled."""
    try:
        return build(all_cases(target)[name], target)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _say_progress(done: int, number: int, started: float) -> None:
    seconds = time.monotonic() - started
    text = f"compile: {done}/{number}, {seconds:.0f} s, about {seconds / done * (number - done):.0f} s left"
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="" if done < number else "\n", file=sys.stderr, flush=True)
    elif done * 10 // number > (done - 1) * 10 // number:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if anything is wrong")
    parser.add_argument("--write", action="store_true", help=f"save as {LEDGER.name}")
    parser.add_argument("--only", default="", metavar="TEXT", help="forms whose name holds TEXT")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of what was compiled (default: %(default)s)")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and under the interpreter nothing is compiled; unset it")
    jobs = [(name, target) for target in TARGETS for name in all_cases(target) if options.only in name]
    if not jobs:
        parser.error(f"no form has {options.only!r} in its name; there are {', '.join(all_cases(TARGETS[0]))}")
    try:
        ledger = read_ledger()
    except FileNotFoundError as error:
        if options.check:
            sys.exit(f"compile: {error}")
        ledger = {}

    started, entries, wrong = time.monotonic(), Ledger(), 0
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _compile_into, (str(options.cache),)) as pool:
        futures = {pool.submit(_build_named, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            name, target = futures[future]
            entry = future.result()
            before = ledger.get(name, {}).get(target)
            if isinstance(entry, str):
                said = [f"does not compile: {entry}"]
            else:
                entries.setdefault(name, {})[target] = entry
                said = problems(all_cases(target)[name], target, entry, None if options.write else before)
                if options.check and before is None:
                    said.append("is not in the ledger; run --write")
            wrong += len(said)
            for problem in said:
                print(f"{name}, {target}, {problem}", flush=True)
            _say_progress(done, len(jobs), started)

    known = {name for target in TARGETS for name in all_cases(target)}
    if options.check:
        for name in ledger.keys() - known:
            wrong += 1
            print(f"{name} is in the ledger, but no such form is there; run --write")
    if options.write and not wrong:
        write_ledger({name: entry for name, entry in (ledger | entries).items() if name in known})
        print(f"compile: {LEDGER}")
    if not (options.check or options.write):
        for name, target in jobs:
            facts = entries.get(name, {}).get(target, {})
            print(f"{name:48} {target:7}", *(f"{figure} {value}" for figure, value in facts.items()))
    print(f"compile: {len(jobs)} compiled, {wrong} problems" + (", not written" if options.write and wrong else ""))
    sys.exit(1 if wrong and (options.check or options.write) else 0)


if __name__ == "__main__":
    main()
