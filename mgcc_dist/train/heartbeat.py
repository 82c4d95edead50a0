"""Show where each rank of a run is, so that a rank that hangs or dies can be named.

While a run with several ranks trains, each rank writes `heartbeat/rank_K.json` every few seconds, from a thread of its
own: its step and phase, and since when. If a rank hangs, the files say which, and what it does while the others wait
for it; a rank whose file is old has died or is frozen. A run that ends in good order removes them. `mgcc slurm status`
reads them too. This file imports torch only when a run starts.
"""

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import is_fenced_off
from mgcc_dist.common.files import read_object, write_json
from mgcc_dist.common.rank_errors import is_lost_connection, is_timeout

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Phase = Literal["waiting for a batch", "training", "validating", "saving a checkpoint"]
FOLDER = "heartbeat"
SECONDS = 10.0
"""between two writes"""
OLD = 60.0
"""age in seconds at which a rank's file says that its process is dead or frozen"""
WARN_AT = 0.8
"""share of the timeout after which ranks without progress are named in the log"""


@dataclass
class RankState:
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    """time at which step and phase were reached, in seconds since the epoch"""
    written: float


class Heartbeat:
    """The heartbeat of this rank, and the timeout of collectives, in a `with` block around the training loop.

    With one rank it does nothing.

    Args:
        minutes: longest time that a rank waits in a collective before the run ends.
    """

    def __init__(self, folder: Path, step: int, minutes: float, accelerator: "Accelerator") -> None:
        self._folder, self._minutes = folder / FOLDER, minutes
        self._ranks, self._is_main = accelerator.num_processes, accelerator.is_main_process
        self._active = self._ranks > 1
        now = time.time()
        self._state = RankState(
            accelerator.process_index, socket.gethostname(), os.getpid(), step, "waiting for a batch", now, now
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def at(self, step: int, phase: Phase) -> None:
        """Note that this rank begins `phase` of the step after `step`."""
        now = time.time()
        self._state = replace(self._state, step=step, phase=phase, since=now, written=now)

    def __enter__(self) -> "Heartbeat":
        if self._is_main:  # a killed run may have had more ranks
            for state in read_states(self._folder.parent):
                if not self._active or state.rank >= self._ranks:
                    self._path(state.rank).unlink(missing_ok=True)
        if self._active:
            _set_timeout(timedelta(minutes=self._minutes))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if not self._active:
            return
        self._ended.set()
        self._thread.join()
        if error is not None and (is_timeout(error) or is_lost_connection(error)):
            states = read_states(self._folder.parent)
            if is_lost_connection(error):
                _wait_for_an_end(states)
            logger.error("%s", describe_ranks(states, self._state.rank))
            return
        from mgcc_dist.common.distributed import TIMEOUT

        with suppress(RuntimeError):  # the group is gone
            _set_timeout(TIMEOUT)
        if is_fenced_off(self._folder.parent):
            return
        self._path(self._state.rank).unlink(missing_ok=True)
        with suppress(OSError):  # other ranks are still there
            self._folder.rmdir()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"

    def _write(self) -> None:
        state = replace(self._state, written=time.time())
        with suppress(OSError, UserError):  # a full disk ends the run in its checkpoint, with a message
            if not is_fenced_off(self._folder.parent):  # else the files are those of the later start
                write_json(self._path(state.rank), asdict(state))

    def _work(self) -> None:
        warned: tuple[int, str] | None = None
        while not self._ended.wait(min(SECONDS, self._minutes * 60 * (1 - WARN_AT) / 2)):
            self._write()
            state = self._state
            here = (state.step, state.phase)
            if time.time() - state.since > WARN_AT * self._minutes * 60 and here != warned:
                warned = here
                states = read_states(self._folder.parent)
                if state.rank == first_alive(states, default=state.rank):
                    limit = f"The run ends after loop.timeout_minutes ({self._minutes:g})."
                    logger.warning("no progress: %s. %s", describe_ranks(states, state.rank), limit)


def _set_timeout(timeout: timedelta) -> None:
    """Set the timeout of the default process group; what a group was created with can't be changed otherwise."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timeout)


def read_states(run: Path) -> list[RankState]:
    """Return the states of a run's ranks, by rank; [] after its end, or with one rank."""
    states = []
    for path in (run / FOLDER).glob("rank_*.json"):
        with suppress(UserError, TypeError, OSError):  # removed in the meantime, or damaged
            states.append(RankState(**read_object(path)))
    return sorted(states, key=lambda state: state.rank)


def read_host(run: Path, rank: int) -> str:
    """Return the node of a rank; "" if its file can't be read."""
    with suppress(UserError, OSError):
        return str(read_object(run / FOLDER / f"rank_{rank}.json").get("host", ""))
    return ""


def first_alive(states: list[RankState], default: int) -> int:
    """Return the lowest rank whose process still writes, which warns for all."""
    return min((one.rank for one in states if time.time() - one.written < OLD and not _has_ended(one)), default=default)


def describe_ranks(states: list[RankState], own: int) -> str:
    """Name the rank that the others wait for, as rank `own` sees it, and say what it does.

    It is one whose process has ended or is frozen; else one of those in the earliest step that are not in a collective
    of the training step; else any other one. Of several it is the one that has been in its phase for the longest time.
    """
    if not states:
        return "the files of the ranks are gone"
    now = max(state.written for state in states)
    ended = [state for state in states if _has_ended(state)]
    frozen = [state for state in states if now - state.written > OLD]
    first = min(state.step for state in states)
    busy = [state for state in states if state.step == first and state.phase != "training"]
    others = [state for state in states if state.rank != own]
    state = min(ended or frozen or busy or others or states, key=lambda one: one.since)
    name = f"rank {state.rank} (process {state.pid} on {state.host})"
    place = f"in step {state.step + 1}, {state.phase}"
    if ended:
        return f"{name} has ended, last seen {place}"
    if frozen:
        return f"{name} has not answered for {timedelta(seconds=round(now - state.written))}, last seen {place}"
    described = f"{name} has been {place} for {timedelta(seconds=round(now - state.since))}"
    is_common = all((one.step, one.phase) == (first, "training") for one in states)
    if is_common and len({one.host for one in states}) > 1:
        described += ", like all others: the network between the nodes may be cut"
    return described


def _wait_for_an_end(states: list[RankState]) -> None:
    """Wait up to a second until one of them has ended: a process closes its connections before it counts as ended."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and not any(map(_has_ended, states)):
        time.sleep(0.05)


def _has_ended(state: RankState) -> bool:
    """Return whether the rank was a process of this machine and has ended."""
    if state.host != socket.gethostname():
        return False
    try:
        return Path(f"/proc/{state.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
