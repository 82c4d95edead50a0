"""Provenance of a result: source, package versions, processor, devices, Slurm job."""

import functools
import hashlib
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mgcc_dist

ROOT = Path(mgcc_dist.__file__).resolve().parent.parent
PACKAGES = (
    *("torch", "triton", "accelerate", "deepspeed", "diffusers", "webdataset", "submitit", "fvcore", "monai"),
    *("torchmetrics", "safetensors", "jsonargparse", "numpy"),
)
UNTRACKED_SHOWN = 20
CLUSTER = {
    "job": "SLURM_JOB_ID",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "restarts": "SLURM_RESTART_COUNT",
    "partition": "SLURM_JOB_PARTITION",
}


@dataclass(frozen=True)
class Source:
    """A source tree compared with its commit."""

    commit: str | None = None
    """12 digits, followed by + if files differ from it; None outside a git checkout"""
    diff: bytes = b""
    """`git diff --binary HEAD`"""
    summary: str = ""
    """`2 files changed, 5 insertions(+)`"""
    untracked: tuple[str, ...] = ()
    """files that are neither tracked nor ignored"""

    @property
    def sha256(self) -> str:
        """sha256 of the diff"""
        return hashlib.sha256(self.diff).hexdigest()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return a JSON object about this process on `device`.

    Keys: `started` (UTC), `commit`, `changes` (None without any), `versions`, `node`, `system`, `processor`, `cores`
    (that this process may use), `threads` (torch's), `device`, `container` (image of Apptainer or Singularity, else
    None), `slurm` (None outside a job).
    """
    tree = source()
    changed = tree.commit is not None and tree.commit.endswith("+")
    untracked = {"untracked": tree.untracked[:UNTRACKED_SHOWN], "untracked_files": len(tree.untracked)}
    job = {key: os.environ[name] for key, name in CLUSTER.items() if name in os.environ}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": tree.commit,
        "changes": {"diff": tree.summary, "diff_sha256": tree.sha256, **untracked} if changed else None,
        "versions": versions(),
        "node": socket.gethostname(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "container": os.environ.get("SINGULARITY_CONTAINER"),  # which Apptainer sets as well
        "slurm": job or None,
    }


def benchmark_header(program: str, device: torch.device | None = None) -> dict[str, Any]:
    """Return what every benchmark's result file starts with: how, when and where its numbers were measured.

    Args:
        program: module that was run as `python -m PROGRAM`.
        device: that was measured; None: the GPU if there is one, else the CPU.
    """
    here = describe_environment(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **{key: here[key] for key in ("versions", "commit", "device", "processor", "cores", "threads")},
        "vectors": torch.backends.cpu.get_cpu_capability(),  # AVX2 or AVX512: a CPU's ratios depend on it
        "load": round(os.getloadavg()[0], 2),
    }


@functools.cache
def source(root: Path = ROOT) -> Source:
    """Compare the tree with its commit, once per process: later changes are not what runs."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout

    def text(*words: str) -> str:
        return git(*words).decode(errors="replace").strip()

    try:
        if Path(text("rev-parse", "--show-toplevel")) != root:
            return Source()
        commit = text("rev-parse", "--short=12", "HEAD")
        diff = git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD")
        summary = text("diff", "--no-ext-diff", "--shortstat", "HEAD")
        untracked = text("ls-files", "--others", "--exclude-standard", "-z").split("\0")
    except (OSError, subprocess.CalledProcessError):
        return Source()
    names = tuple(name for name in untracked if name)
    return Source(commit + ("+" if diff or names else ""), diff, summary, names)


def versions() -> dict[str, str]:
    """Return the versions of Python, this package, installed PACKAGES, and the parts of CUDA or ROCm."""
    found = {"mgcc_dist": mgcc_dist.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    device = {"cuda": torch.version.cuda, "cudnn": cudnn, "hip": torch.version.hip, "nvidia_driver": _nvidia_driver()}
    return found | {name: str(number) for name, number in device.items() if number}


def processor() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` has bfloat16 instructions; without them bfloat16 is emulated, far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN's bfloat16 convolutions are faster than float32 only with these instructions; False on other processors.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return match.group() if match else None
