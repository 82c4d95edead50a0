"""Let one rank of a process group report an error, so that one line says what is wrong.

A rank that fails closes its connections, so the others fail too, in the collective that they wait in, and their errors
would bury the first. The ranks agree through the key-value store of their process group, which needs no collective.
"""

import hashlib
import os
import sys
import time
from datetime import timedelta
from typing import Any

STORE_TIMEOUT = timedelta(seconds=5)
SECONDS_FOR_RANK_0 = 2.0
LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused"),  # gloo
    "remote process exited",  # NCCL
)
TIMED_OUT = ("Timed out waiting", "Timeout waiting", "Watchdog caught collective operation timeout")  # gloo; NCCL
_FAILED = "mgcc_dist/failed"


def rank() -> int:
    """This process's rank, as its launcher or `common.distributed` put it into the environment; 0 without one."""
    word = os.environ.get("RANK", "")  # under Slurm it is set only once the process has joined its group
    return int(word) if word.isdecimal() else 0


def wrong_variable() -> str:
    """Return what is wrong with the environment variables of launchers; "" if nothing is."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        word = os.environ.get(name, "0")
        if not word.isdecimal():
            return f"{name}: expected an integer from 0, got {word!r}. Launchers set it; unset it to start one process."
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return "WORLD_SIZE: is set without RANK, MASTER_ADDR and MASTER_PORT. Unset it, or start with a launcher."
    return ""


def claim_report(message: str, exit_code: int) -> bool:
    """Return whether this rank is the one to print `message`. The other ranks end with `exit_code` and print nothing.

    Of ranks that fail with the same message rank 0 prints it, or the first one, if rank 0 is much later.
    """
    store = _connect()
    if store is None:
        return True
    key = f"mgcc_dist/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store.set(_FAILED, str(exit_code))
        if rank():
            deadline = time.monotonic() + SECONDS_FOR_RANK_0
            while not store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.05)
        return bool(store.add(key, 1) == 1)
    except RuntimeError:  # the process with the store has ended
        return True


def reported_exit_code() -> int | None:
    """Return the exit code of a rank that has reported an error; None if none has."""
    store = _connect()
    try:
        return int(store.get(_FAILED)) if store is not None and store.check([_FAILED]) else None
    except RuntimeError:  # the process with the store has ended
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because another rank ended."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONNECTION)


def is_timeout(error: BaseException) -> bool:
    """Return whether a collective failed because another rank did not take part in time."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TIMED_OUT)


def _connect() -> Any:
    """Return the store of this process's group, through a connection of its own; None without a group."""
    torch = sys.modules.get("torch")  # not imported for an error on the command line
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if torch.distributed.get_world_size() == 1 or not host or not port:
        return None
    try:
        store = torch.distributed.TCPStore(host, int(port), is_master=False, timeout=STORE_TIMEOUT)
    except RuntimeError:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store when it restarts the ranks
    return torch.distributed.PrefixStore(attempt, store)
