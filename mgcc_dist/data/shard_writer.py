"""How any number of ranks fill a shard folder together, whole or not at all, and go on after a kill.

Missing shards are dealt to the ranks in turn. What a shard holds is made by the main thread and written by another
beside it. Shards appear whole, each followed by its entry for index.json, so a start after a kill makes only what is
missing; index.json comes last. `request.json` says what the folder is made of, and nothing else is ever added to it.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import DISK_FULL, EXIT_STOPPED, UserError
from mgcc_dist.common.files import read_json, write_json
from mgcc_dist.common.signals import StopSignal

ENTRIES = "entries"
REQUEST = "request.json"

Made = TypeVar("Made")


def is_filled(folder: Path, request: dict[str, Any], holds: str) -> bool:
    """Whether `folder` is whole; `holds` says in messages what it is of.

    Raises:
        UserError: what it holds was made by another request.
    """
    if not (folder / REQUEST).is_file():
        return False
    made = read_json(folder / REQUEST)
    for key, value in request.items():
        if made.get(key) != value:
            raise UserError(
                f"{folder} holds {holds} made with {key} {made.get(key)}, not {value}; "
                "delete the folder, or choose another --out"
            )
    return (folder / "index.json").is_file()


def fill(
    folder: Path,
    request: dict[str, Any],
    shards: Sequence[tuple[str, range]],
    make: Callable[[range, tqdm], Made],
    write: Callable[[Path, Made], dict[str, Any]],
    finish: Callable[[list[dict[str, Any]]], None],
    what: str,
    accelerator: Accelerator,
) -> None:
    """Make and write what is missing of `shards`, each a file name and the numbers of its items. Collective.

    Args:
        make: computes the items of a shard and advances the bar by them.
        write: writes them to a path and returns the shard's entry for index.json; runs in a thread of its own.
        finish: writes index.json, of all entries, on the main process.
        what: the word that the bar and messages begin with.

    Raises:
        UserError: the disk is full; the shards that are written are kept and gone on with.
        SystemExit: with EXIT_STOPPED after a signal, once the shards in hand are written.
    """
    if accelerator.is_main_process:
        _keeping(folder, what, lambda: write_json(folder / REQUEST, request))
    # The main process alone looks at the disk, so that all ranks deal out the same list.
    missing = [number for number, (name, _) in enumerate(shards) if not _entry(folder, name).is_file()]
    missing = broadcast_object_list([missing])[0]
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = [shards[number] for number in missing[rank::world]]
    who = f"{what} (rank {rank} of {world})" if world > 1 else what
    accelerator.print(f"{what}: {len(missing)} of {len(shards)} shards are to be made -> {folder}", flush=True)

    def put(name: str, made: Made) -> None:
        _keeping(folder, what, lambda: write_json(_entry(folder, name), write(folder / name, made)))

    with (
        StopSignal() as stop,
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=sum(len(items) for _, items in mine),
            desc=who,
            unit="image",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        ) as bar,
    ):
        writing: Future[None] | None = None
        for turn in range(-(-len(missing) // world)):
            made = make(mine[turn][1], bar) if turn < len(mine) else None
            _agree(writing)
            writing = writer.submit(put, mine[turn][0], made) if made is not None else None
            if stop.received_on_any_rank():
                _agree(writing)
                accelerator.print(f"{what}: stopped by a signal; the same command goes on from here")
                raise SystemExit(EXIT_STOPPED)
        _agree(writing)
    if accelerator.is_main_process:
        _keeping(folder, what, lambda: finish([read_json(_entry(folder, name)) for name, _ in shards]))
        shutil.rmtree(folder / ENTRIES)
    accelerator.wait_for_everyone()


def _agree(writing: "Future[None] | None") -> None:
    """Wait for the shard that is being written; if that failed on any rank, all raise. Collective."""
    with raise_on_all_ranks():
        if writing:
            writing.result()


def _keeping(folder: Path, what: str, write: Callable[[], None]) -> None:
    """Call `write`, and explain a full disk."""
    try:
        write()
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{what}: {error.strerror} for {folder}; the {len(list(folder.glob('*.tar')))} shards that are written "
            "are kept: free some space, and the same command goes on from here"
        ) from error


def _entry(folder: Path, name: str) -> Path:
    return folder / ENTRIES / f"{name}.json"
