"""Start a program with several processes, by a launch file that ships with the package or one of your own.

    mgcc launch 8gpu_zero2 ldm --preset busi --data.shards out/busi
    mgcc launch 4x8gpu_ddp_bf16 --machine_rank 1 --main_process_ip HOST segment --preset mgcc_busi
    ACCELERATE_USE_CPU=true mgcc launch cpu_2ranks segment

NAME is a file in launch/accelerate/, without .yaml, or the path of a file of Accelerate. Words between it and the
program are options of `accelerate launch`, words after it are the program's.

It runs `accelerate launch --config_file FILE -m mgcc_dist.PROGRAM ...`, in any folder, also from an installed wheel.
launch/README.md describes the files.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.errors import UserError, did_you_mean, reason_of, run_program

PACKAGE = Path(__file__).parent
FILES = PACKAGE / "launch" / "accelerate"
LAUNCHED = ("segment", "ldm")


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by `accelerate launch`.

    Raises:
        UserError: the launch file or the program does not exist.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "--help-all"):
        files = ", ".join(file_names())
        print(f"usage: mgcc launch NAME [options of accelerate launch] PROGRAM [options]\n\n{__doc__.strip()}")
        print(f"\nlaunch files: {files}\nprograms: {', '.join(LAUNCHED)}")
        return
    os.execv(sys.executable, launch_command(words))


def launch_command(words: Sequence[str]) -> list[str]:
    """Return the command that starts a program by a launch file: NAME, options of Accelerate, PROGRAM, its options."""
    name, *rest = words
    file = find_file(name)
    index = next((index for index, word in enumerate(rest) if word in LAUNCHED), None)
    if index is None:
        hint = next(filter(None, (did_you_mean(word, LAUNCHED) for word in rest if not word.startswith("-"))), "")
        advice = f"Add one of {', '.join(LAUNCHED)}, and then its options."
        raise UserError(f"launch {name}: no program given.{hint} {advice}")
    options = ["--config_file", str(file), *_deepspeed_options(file), *rest[:index]]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *options, "-m", f"mgcc_dist.{rest[index]}", *rest[index + 1 :]]


def find_file(name: str) -> Path:
    """Return the launch file at that path, or the shipped one of that name.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in file_names():
        return FILES / f"{name}.yaml"
    hint = did_you_mean(name, file_names()) or f" Shipped files: {', '.join(file_names())}."
    raise UserError(f"launch {name}: no such launch file.{hint}")


def file_names() -> list[str]:
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def _deepspeed_options(file: Path) -> list[str]:
    """Return the option that names the file's DeepSpeed config, which shipped files name relative to the package.

    Raises:
        UserError: the file is not a launch file of Accelerate.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({reason_of(error)})") from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(f"{file}: is not a launch file of Accelerate, because it has no distributed_type")
    settings = content.get("deepspeed_config")
    named = settings.get("deepspeed_config_file") if isinstance(settings, dict) else None
    if not isinstance(named, str) or Path(named).is_file() or not (PACKAGE / named).is_file():
        return []
    return ["--deepspeed_config_file", str(PACKAGE / named)]


if __name__ == "__main__":
    run_program("launch", main)
