"""The run folder: `config.yaml` says what it is, `environment.json` where it ran, `result.json`, which is written last,
that it is finished."""

import json
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from mgcc_dist.common.config import as_plain, flatten, save
from mgcc_dist.common.environment import facts, source
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json, write_bytes, write_json

# Keys that change how a run is carried out but not what comes out of it.
FREE_KEYS = ("out", "data.workers", "kernels")

ENVIRONMENT = "environment.json"
DIFF_LIMIT = 2**20
"""bytes of a diff that are kept; a longer one is known by its sha256 alone"""


def open_run_folder(folder: Path, config: Any, accelerator: Accelerator) -> None:
    """Take `folder` for a run of `config` and save the config there; a folder of the same config is gone on with.

    A folder in which no checkpoint was saved yet is free: its run failed at the start, on wrong settings perhaps.

    Raises:
        UserError: the folder holds a run of another config; the message names a key that differs.
    """
    path = folder / "config.yaml"
    goes_on = path.is_file() and (is_finished(folder) or any(folder.glob("checkpoints/step-*")))
    if goes_on:
        then, now = flatten(yaml.safe_load(path.read_text())), flatten(as_plain(config))
        differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        differing = [key for key in differing if key not in FREE_KEYS]
        if differing:
            key = differing[0]
            more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
            raise UserError(
                f"{folder} holds a run with {key} = {then.get(key)}, not {now.get(key)}{more}; "
                "choose another --out, or delete the folder"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save(config, path)
    _note_start(folder, accelerator, goes_on)


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def read_result(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "result.json")
    except ValueError as error:
        raise UserError(f"{folder / 'result.json'} is damaged ({error}); delete it and start the run again") from error


def write_result(folder: Path, result: dict[str, Any], accelerator: Accelerator) -> None:
    """Mark the run as finished; with where it ran: the last start, and under `earlier` those before. Collective.

    `open_run_folder` has noted these.
    """
    if accelerator.is_main_process:
        *earlier, last = read_json(folder / ENVIRONMENT)
        ranks = {"world_size": accelerator.num_processes, "precision": accelerator.mixed_precision}
        write_json(folder / "result.json", result | ranks | {"environment": last | {"earlier": earlier}})
    accelerator.wait_for_everyone()


def _note_start(folder: Path, accelerator: Accelerator, goes_on: bool) -> None:
    """Put this start into environment.json, and its changes of the source beside. Collective.

    The file lists the starts of a run, oldest first; of those on one source, packages, hosts and devices the last.
    """
    ours = facts(accelerator.device)
    ranks = gather_object([(ours["node"], ours["device"])])
    nodes: dict[str, list[str]] = {}
    for node, device in ranks:
        nodes.setdefault(node, []).append(device)
    if not accelerator.is_main_process or is_finished(folder):
        return
    start = ours | {"nodes": nodes}
    path = folder / ENVIRONMENT
    earlier = read_json(path) if goes_on and path.is_file() else []
    write_json(path, [each for each in earlier if _where(each) != _where(start)] + [start])
    diff = source().diff
    if diff and len(diff) <= DIFF_LIMIT:
        write_bytes(folder / f"changes-{source().sha256[:8]}.diff", diff)


def _where(start: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it, without what is of one start alone."""
    return json.loads(json.dumps({key: value for key, value in start.items() if key not in ("started", "slurm")}))
