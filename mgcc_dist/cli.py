"""The `mgcc` command: `mgcc segment ...` is `python -m mgcc_dist.segment ...`, and so on for every program.

What it imports at the top is light, so that Ctrl-C soon finds the handler of `run_program`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import mgcc_dist
from mgcc_dist.common.errors import UserError, did_you_mean, run_program

# Command: its module, whose `main(argv)` runs it, and one line of help.
PROGRAMS = {
    "shards": ("mgcc_dist.shards", "convert image folders to WebDataset shards, draw phantoms, write split files"),
    "ldm": ("mgcc_dist.ldm", "train a latent diffusion model, sample synthetic images, evaluate them"),
    "segment": ("mgcc_dist.segment", "train one segmentation run: any method, network, split and seed"),
    "evaluate": ("mgcc_dist.evaluate", "score runs on labeled shards: intervals, calibration, robustness, one page"),
    "predict": ("mgcc_dist.predict", "segment images or DICOM with a trained or shipped model (research use only)"),
    "serve": ("mgcc_dist.serve", "correct masks on a local page, and save them as training data (research use only)"),
    "export": ("mgcc_dist.export", "export a run as ONNX, TorchScript, OpenVINO, MONAI bundle or model folder"),
    "push": ("mgcc_dist.push", "upload a model folder to the Hugging Face Hub"),
    "pull": ("mgcc_dist.pull", "download and verify a model folder from the Hugging Face Hub"),
    "report": ("mgcc_dist.report", "put finished runs and the tables of sweeps on one page"),
    "sweep": ("mgcc_dist.sweeps", "print the commands of all runs of a sweep file"),
    "search": ("mgcc_dist.search", "run trials of a sweep's search, until Optuna has found the best config"),
    "slurm": ("mgcc_dist.slurm.__main__", "run a sweep on a Slurm cluster, or on this machine"),
    "launch": ("mgcc_dist.accelerate_launch", "start segment or ldm with several processes, by a launch file's name"),
    "list": ("mgcc_dist.listing", "list methods, networks, data sets, presets, ... by name"),
    "bench": ("mgcc_dist.bench.__main__", "benchmark the kernels on this device"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first word names, with the words after it."""
    words = list(sys.argv[1:] if argv is None else argv)
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in PROGRAMS:
        run_program(command, lambda: import_module(PROGRAMS[command][0]).main(rest))
    else:
        run_program("mgcc", lambda: _answer(command))


def _answer(word: str) -> None:
    if word in ("-h", "--help"):
        print(_help())
    elif word == "--version":
        print(_version())
    else:
        hint = did_you_mean(word.lstrip("-"), PROGRAMS) or f" Choose one of {', '.join(PROGRAMS)}."
        raise UserError(f"{word}: unknown command.{hint}")


def _help() -> str:
    from mgcc_dist.common.help import list_commands

    summaries = [(name, summary) for name, (_, summary) in PROGRAMS.items()]
    return "\n\n".join(
        [
            "usage: mgcc COMMAND [options]\n       mgcc --version",
            mgcc_dist.__doc__.split("\n")[0],
            list_commands("commands (mgcc COMMAND --help)", summaries),
            "With several processes: mgcc launch NAME segment [options]; also ldm. mgcc launch --help lists the names.",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    return f"mgcc-dist {mgcc_dist.__version__} (torch {torch})"


if __name__ == "__main__":
    main()
