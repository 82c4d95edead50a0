"""What the doctor's job runs on a node: `python3 probe.py FOLDER SECONDS PACKAGE...`. Needs no package.

Writes FOLDER/probe.json: this Python, versions of packages, what torch sees, and when Slurm's signal arrived.
"""

import json
import os
import platform
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any


def main(folder: Path, seconds: float, packages: list[str]) -> None:
    start = time.monotonic()
    report: dict[str, Any] = {"signal_seconds": None}

    def record(_number: int, _frame: FrameType | None) -> None:
        report["signal_seconds"] = time.monotonic() - start

    def save() -> None:
        partial = folder / "probe.json.part"
        partial.write_text(json.dumps(report))
        partial.replace(folder / "probe.json")

    signal.signal(signal.SIGUSR2, record)
    report |= {"python": platform.python_version(), "executable": sys.executable}
    save()  # before imports that may crash
    report["versions"] = {package: _version(package) for package in packages}
    report["errors"] = {}
    for module in ("torch", "submitit", "mgcc_dist"):
        try:
            __import__(module)
        except Exception as error:
            report["errors"][module] = f"{type(error).__name__}: {error}"
    if "torch" not in report["errors"]:
        import torch

        report |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    while report["signal_seconds"] is None and time.monotonic() < start + seconds:
        save()
        time.sleep(0.5)
    save()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if os.environ.get("SLURM_PROCID", "0") == "0":
        main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
