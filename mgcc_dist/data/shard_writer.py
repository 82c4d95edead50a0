"""Write a shard folder with all ranks; interrupted runs resume.

A complete folder is extended by further shards; until index.json is replaced, at the end, it stays complete as it was.

Missing shards are assigned to ranks round-robin. The main thread computes a shard's items while a second thread writes
the previous shard. Shards are written atomically, each followed by its entry for index.json, so a restarted run
computes only the missing ones; index.json is written last. `request.json` describes what the folder is made from.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import DISK_FULL, EXIT_STOPPED, UserError
from mgcc_dist.common.files import read_json, read_object, write_json
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.common.signals import StopSignal
from mgcc_dist.data.records import INDEX, REQUEST

logger = logging.getLogger(__name__)

ENTRIES = "entries"

Items = TypeVar("Items")


def is_complete(folder: Path, request: dict[str, Any], content: str) -> bool:
    """Return whether `folder` is complete; `content` names what it holds, for messages.

    Raises:
        UserError: it was made for a different request.
    """
    if not (folder / REQUEST).is_file():
        return False
    found = read_object(folder / REQUEST)
    for key, value in request.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: holds {content} made with {key} {found.get(key)}, not {value}. Choose another --out."
            )
    return (folder / INDEX).is_file()


def write_shards_distributed(
    folder: Path,
    request: dict[str, Any],
    shards: Sequence[tuple[str, range]],
    compute: Callable[[range, ProgressBar], Items],
    write: Callable[[Path, Items], dict[str, Any]],
    write_index: Callable[[list[dict[str, Any]]], None],
    task: str,
    accelerator: Accelerator,
) -> None:
    """Compute and write the missing shards of a folder. Collective.

    Args:
        shards: file name and item indices of each shard.
        compute: computes a shard's items and advances the progress bar.
        write: writes the items to a path and returns the shard's entry for index.json; runs in a thread.
        write_index: writes index.json from all entries; called on the main process.
        task: prefix of the progress bar and of messages.

    Raises:
        UserError: `compute` raised it, or the disk is full. Written shards are kept, and a rerun resumes after them.
        SystemExit: with EXIT_STOPPED after a signal, once the shards in progress are written.
    """
    with raise_on_all_ranks():
        if accelerator.is_main_process and not (folder / INDEX).is_file():
            with _explained_full_disk(folder, task):
                write_json(folder / REQUEST, request)
    # Only the main process looks at the disk, so that all ranks see the same list.
    missing = [number for number, (name, items) in enumerate(shards) if not _is_written(folder, name, len(items))]
    missing = broadcast_object_list([missing])[0]
    rank, world = accelerator.process_index, accelerator.num_processes
    assigned = [shards[number] for number in missing[rank::world]]
    logger.info("%s: writing %d of %d shards -> %s", task, len(missing), len(shards), folder)

    def write_with_entry(name: str, items: Items) -> None:
        with _explained_full_disk(folder, task):
            write_json(_entry_file(folder, name), write(folder / name, items))

    with (
        StopSignal() as stop,
        ThreadPoolExecutor(1) as writer,
        ProgressBar(
            total=sum(len(shards[number][1]) for number in missing),
            description=task,
            unit="images",
            share=sum(len(indices) for _, indices in assigned),
        ) as bar,
    ):
        pending: Future[None] | None = None
        stopped = False
        for turn in range(-(-len(missing) // world)):  # the same number on all ranks: each turn is collective
            items, failure = None, None
            try:
                items = compute(assigned[turn][1], bar) if turn < len(assigned) else None
            except UserError as error:
                failure = error
            _wait_for(pending, failure)
            pending = writer.submit(write_with_entry, assigned[turn][0], items) if items is not None else None
            if stopped := stop.received_on_any_rank():
                break
        _wait_for(pending)
    if stopped:
        logger.info("%s: stopped by a signal. Rerun the same command to resume.", task)
        raise SystemExit(EXIT_STOPPED)
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            with _explained_full_disk(folder, task):
                write_index([read_json(_entry_file(folder, name)) for name, _ in shards])
                write_json(folder / REQUEST, request)
            shutil.rmtree(folder / ENTRIES, ignore_errors=True)


def _wait_for(pending: "Future[None] | None", failure: UserError | None = None) -> None:
    """Wait for the shard being written. If that or computing the next one failed on any rank, all raise. Collective."""
    with raise_on_all_ranks():
        if pending:
            pending.result()
        if failure:
            raise failure


@contextmanager
def _explained_full_disk(folder: Path, task: str) -> Iterator[None]:
    """Turn a full-disk error into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{task}: {error.strerror} for {folder} ({len(list(folder.glob('*.tar')))} shards are kept). "
            "Free some space and rerun the same command to resume."
        ) from error


def _is_written(folder: Path, name: str, records: int) -> bool:
    """Return whether the shard has been written, with that many records; an earlier start may have asked for fewer."""
    entry = _entry_file(folder, name)
    return entry.is_file() and len(read_json(entry)["records"]) == records


def _entry_file(folder: Path, name: str) -> Path:
    return folder / ENTRIES / f"{name}.json"
