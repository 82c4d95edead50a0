"""Compile the Triton kernels ahead of time, without a GPU, and compare their resource usage with the ledger.

    python -m mgcc_dist.kernels.compile            # print the resource usage of each kernel
    python -m mgcc_dist.kernels.compile --check    # exit 1 on a spill, a missing tensor-core instruction, a regression
    python -m mgcc_dist.kernels.compile --write    # save as ledger/triton-VERSION.json if there are no problems
    python -m mgcc_dist.kernels.compile --import my_kernel.py --only my_kernel --ledger my_ledger

Kernels are compiled in bfloat16 at the paper's sizes, for each GPU architecture in targets.py. Each Triton version has
its own ledger. A regression is more than 1.1 times the ledger's registers, more shared memory, or fewer vector loads.

Compiled kernels are cached in --cache, so an interrupted run resumes and unchanged kernels are only read again.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line first; torch and Triton, which take seconds to import, follow."""
    parser = _parser()
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: the interpreter does not compile. Unset it.")
    _import_plugins(options.imports)
    from . import aot

    ledger_folder = options.ledger or aot.LEDGER_DIR
    jobs = [(name, target) for target in aot.TARGETS for name in aot.all_specs(target) if options.only in name]
    if not jobs:
        names = ", ".join(aot.all_specs(aot.TARGETS[0]))
        parser.error(f"--only: no kernel name contains {options.only!r}. Choose from {names}.")
    ledger = read_ledger(ledger_folder, options.check, options.write)

    start, entries, num_problems = time.monotonic(), aot.Ledger(), 0
    cache = options.cache or _default_cache(aot.triton.__version__)
    aot.triton.knobs.cache.dir = str(cache)
    with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:  # which inherit the cache and the plugins
        futures = {pool.submit(aot.build_by_name, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            name, target = futures[future]
            entry = future.result()
            ledger_entry = ledger.get(name, {}).get(target)
            if isinstance(entry, str):
                found = [f"does not compile: {entry}"]
            else:
                entries.setdefault(name, {})[target] = entry
                spec = aot.all_specs(target)[name]
                found = aot.problems(spec, target, entry, None if options.write else ledger_entry)
                if options.check and ledger_entry is None:
                    found.append("not in the ledger. Run --write.")
            num_problems += len(found)
            for problem in found:
                print(f"{name}, {target}, {problem}", flush=True)
            _print_progress(done, len(jobs), start)

    known = {name for target in aot.TARGETS for name in aot.all_specs(target)}
    if options.check:
        for name in ledger.keys() - known:
            num_problems += 1
            print(f"{name}: in the ledger, but there is no such kernel. Run --write.")
    if options.write and not num_problems:
        kept = {name: entry for name, entry in (ledger | entries).items() if name in known}
        aot.write_ledger(kept, ledger_folder)
        print(f"compile: wrote {aot.ledger_path(ledger_folder)}")
    if not (options.check or options.write):
        for name, target in jobs:
            usage = entries.get(name, {}).get(target, {})
            print(f"{name:48} {target:7}", *(f"{metric} {value}" for metric, value in usage.items()))
    not_written = "; ledger not written" if options.write and num_problems else ""
    print(f"compile: {len(jobs)} compiled, {num_problems} problems{not_written}")
    sys.exit(1 if num_problems and (options.check or options.write) else 0)


def read_ledger(folder: Path, check: bool, write: bool) -> dict[str, Any]:
    """Read the ledger of the installed Triton. Without one, say so, and exit if the kernels are to be checked."""
    from . import aot

    try:
        return aot.read_ledger(folder)
    except FileNotFoundError as error:
        if check:
            sys.exit(f"compile: {error}")
        if not write:
            print(f"compile: {error} Resource usage is printed without a comparison.", file=sys.stderr)
        return {}


def _import_plugins(words: Sequence[str]) -> None:
    """Import modules and files that register operations: those in `words`, and those of installed plugins."""
    for word in words:
        path = Path(word)
        sys.path.append(str(path.resolve().parent if path.suffix == ".py" else Path.cwd()))
        import_module(path.stem if path.suffix == ".py" else word)
    for entry in entry_points(group="mgcc_dist.plugins"):
        entry.load()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m mgcc_dist.kernels.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module or file that registers kernels; repeatable",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if there is a problem")
    parser.add_argument("--write", action="store_true", help="save as triton-VERSION.json in the ledger folder")
    parser.add_argument("--ledger", type=Path, metavar="FOLDER", help="folder of ledgers (default: kernels/ledger)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument(
        "--cache", type=Path, help="folder of compiled kernels (default: ~/.cache/mgcc-dist/triton-VERSION)"
    )
    return parser


def _default_cache(version: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgcc-dist" / f"triton-{version}"


def _print_progress(done: int, total: int, start: float) -> None:
    seconds = time.monotonic() - start
    text = f"compile: {done}/{total}, {seconds:.0f} s, about {seconds / done * (total - done):.0f} s left"
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done * 10 // total > (done - 1) * 10 // total:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
