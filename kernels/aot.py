"""Ahead-of-time compilation of the Triton kernels, without a GPU, and the ledger of their resource usage.

`compile` is the command line. The specs are those of each operation's `compile_specs`, compiled as Triton would compile
them at launch. All tools that read the machine code are part of Triton's wheel. Register allocation changes
between Triton versions, so each version has its own ledger.
"""

import re
import subprocess
import tempfile
from functools import cache
from json import dumps, loads
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from .compile_spec import CompileSpec
from .operation import specs
from .targets import SHARED_BYTES, TARGETS

LEDGER_DIR = Path(__file__).parent / "ledger"
MAX_REGISTER_GROWTH = 1.1
"""a kernel may use this many times the registers of its ledger entry"""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Entry = dict[str, int]
"""registers, stack_bytes, spills (spill loads and stores; on AMD registers), shared_bytes, tensor_core (instructions),
vector_loads (of 16 bytes)"""
Ledger = dict[str, dict[str, Entry]]
"""spec name -> target -> entry"""


@cache
def all_specs(target: str) -> dict[str, CompileSpec]:
    """Return the specs of all kernels for `target`, those of plugins too, by name."""
    return {spec.name: spec for operation in specs().values() for spec in operation.compile_specs(target)}


def build(spec: CompileSpec, target: str) -> Entry:
    """Compile `spec` for `target` and return the resource usage of its machine code."""
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    backend = make_backend(gpu)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(spec.kernel.arg_names):
        value = spec.scalars.get(name)
        if name in spec.constants or value == 1:
            signature[name], constants[i,] = "constexpr", spec.constants.get(name, value)
        elif value is None:
            signature[name] = spec.pointers[name]
            attributes[i,] = backend.parse_attr("DS")  # torch aligns memory to 16 bytes; no tensor here reaches 2 GB
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[i,] = backend.parse_attr("D")
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu, options=dict(spec.options))
    usage = _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amdgcn(compiled.asm["amdgcn"])
    return {**usage, "shared_bytes": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> Entry:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm",))
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


def problems(spec: CompileSpec, target: str, entry: Entry, ledger_entry: Entry | None) -> list[str]:
    """Return what is wrong with `entry`: on its own, and compared with `ledger_entry` if given."""
    found = []
    if entry["spills"] or entry["stack_bytes"]:
        found.append(f"spills: expected 0, got {entry['spills']} ({entry['stack_bytes']} bytes of stack)")
    if spec.tensor_cores and not entry["tensor_core"]:
        found.append("tensor_core: expected at least 1 instruction, got 0")
    if entry["shared_bytes"] > SHARED_BYTES[target]:
        found.append(f"shared_bytes: expected at most {SHARED_BYTES[target]}, got {entry['shared_bytes']}")
    if ledger_entry is None:
        return found
    for metric, regressed in (
        ("registers", entry["registers"] > MAX_REGISTER_GROWTH * ledger_entry["registers"]),
        ("shared_bytes", entry["shared_bytes"] > ledger_entry["shared_bytes"]),
        ("vector_loads", entry["vector_loads"] < ledger_entry["vector_loads"]),
    ):
        if regressed:
            found.append(f"{metric}: was {ledger_entry[metric]}, now {entry[metric]}")
    return found


def ledger_path(folder: Path = LEDGER_DIR) -> Path:
    """Return the ledger of the installed Triton version in `folder`."""
    return folder / f"triton-{triton.__version__}.json"


def read_ledger(folder: Path = LEDGER_DIR) -> Ledger:
    """Read the ledger of the installed Triton version in `folder`.

    Raises:
        FileNotFoundError: this version has no ledger.
    """
    path = ledger_path(folder)
    if not path.is_file():
        existing = ", ".join(sorted(each.stem.removeprefix("triton-") for each in folder.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"triton {triton.__version__}: no ledger for this version (existing: {existing}). Install one of these "
            "versions, or run `python -m mgcc_dist.kernels.compile --write` and review the difference."
        )
    return loads(path.read_text(encoding="utf-8"))["kernels"]


def write_ledger(ledger: Ledger, folder: Path = LEDGER_DIR) -> None:
    """Write the ledger with one line per spec and target, for readable diffs."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    for name, entries in sorted(ledger.items()):
        lines = ",\n".join(f"  {dumps(target)}: {dumps(entries[target])}" for target in TARGETS if target in entries)
        blocks.append(f" {dumps(name)}: {{\n{lines}\n }}")
    text = f'{{"triton": {dumps(triton.__version__)}, "kernels": {{\n' + ",\n".join(blocks) + "\n}}\n"
    scratch = ledger_path(folder).with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(ledger_path(folder))


def build_by_name(name: str, target: str) -> Entry | str:
    """Return the entry of a spec, or the error message if it does not compile."""
    try:
        return build(all_specs(target)[name], target)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
