"""The run folder: `config.yaml` identifies the run, `environment.json` records where it ran, and `result.json` marks it
as finished."""

import functools
import json
import logging
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from mgcc_dist.common.config import save
from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.environment import describe_environment, source
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import check_fence, raise_fence
from mgcc_dist.common.files import InvalidJson, read_json, write_bytes, write_json, write_text
from mgcc_dist.common.identity import describe_difference
from mgcc_dist.common.lock import lock_folder
from mgcc_dist.data.remote import hash_file, shown
from mgcc_dist.train.saved_run import differences, is_finished, read_result

logger = logging.getLogger(__name__)

LENGTH_KEYS = ("loop.epochs", "loop.steps")
ENVIRONMENT = "environment.json"
DIFF_LIMIT = 2**20
"""Largest diff in bytes that is saved; of a longer one only the sha256 is."""


def open_run_folder(folder: Path, config: Any, accelerator: Accelerator, fixed_length: str = "") -> None:
    """Create or reopen the run folder of `config`, lock it, and save a new run's config there. Collective.

    A folder without checkpoints may be reused by any config: its run failed at the start, perhaps on wrong settings. A
    run that differs only in a higher `loop.epochs` or `loop.steps` is extended, unless `fixed_length` says why it can't
    be. It ends in the same last weights as a run of that length from the start. Its best ones may differ, because the
    step at which it ended before was validated too. The folder of a finished run may be read-only.

    Raises:
        UserError: another process uses the folder, or it holds another run (common/identity.py); the message names a
            key that differs.
    """
    if is_finished(folder) and not check_run_folder(folder, config, fixed_length):
        return
    lock_folder(folder, accelerator)
    longer = check_run_folder(folder, config, fixed_length)
    raise_fence(folder, accelerator)
    resumes = has_run(folder)
    accelerator.wait_for_everyone()
    with raise_on_all_ranks():
        if accelerator.is_main_process and longer:
            _extend(folder, *longer)
        elif accelerator.is_main_process and not resumes:  # the first config names the data whose hashes were saved
            save(config, folder / "config.yaml")
    _record_environment(folder, accelerator, resumes)


def has_run(folder: Path) -> bool:
    """Return whether `folder` holds a run that can be resumed or is finished."""
    return is_finished(folder) or any(folder.glob("checkpoints/step-*"))


def check_run_folder(folder: Path, config: Any, fixed_length: str = "") -> tuple[str, Any] | None:
    """Return the key and value by which `config` extends the run in `folder`; None if it is that run, or a new one.

    Raises:
        UserError: the folder holds another run, or its config.yaml is missing or damaged.
    """
    if not has_run(folder):
        return None
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: does not exist, but {folder} holds checkpoints or a result, and nobody knows of which run. "
            "Restore it, or choose another --out."
        )
    differing = differences(folder, config)
    if not differing:
        return None
    key, then, now, more = describe_difference(differing)
    is_longer = len(differing) == 1 and key.endswith(LENGTH_KEYS) and None not in (then, now) and now > then
    if not is_longer:
        raise UserError(f"{folder}: holds a run with {key} = {then}, not {now}{more}. Choose another --out.")
    if not fixed_length and not any(folder.glob("checkpoints/step-*")):
        fixed_length = "it has no checkpoint any more"
    if fixed_length:
        init = f"--{key.rpartition('loop.')[0]}init {folder / 'last'}"
        raise UserError(
            f"{folder}: holds a run with {key} = {then}, and can't be extended to {now}, because {fixed_length}. "
            f"To start a new run from its weights, choose another --out and pass {init}."
        )
    return key, now


def _extend(folder: Path, key: str, value: Any) -> None:
    """Give the run in `folder` another length.

    The result is put aside first: a kill between the two writes leaves an unfinished run.
    """
    if is_finished(folder):
        earlier = f"result-{read_result(folder)['steps']}.json"
        (folder / "result.json").rename(folder / earlier)
        logger.info("%s: extending a finished run to %s %s; its result is kept as %s", folder, key, value, earlier)
    path = folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    *sections, name = key.split(".")
    functools.reduce(operator.getitem, sections, tree)[name] = value
    write_text(path, yaml.safe_dump(tree, sort_keys=False))


def hash_inputs(files: Iterable[Path | str]) -> dict[str, str]:
    """Return the sha256 of each file, or index.json at a URL, that says what data the run uses.

    Files that no longer exist are left out.

    Raises:
        UserError: a URL can't be read.
    """
    return {shown(str(file)): hash_file(file) for file in files if isinstance(file, str) or file.is_file()}


def check_inputs(folder: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check the hashes of a run's input files against those that were saved with it.

    Raises:
        UserError: a file in both has another content now.
    """
    for path, sha256 in now.items():
        if saved.get(path, sha256) != sha256:
            raise UserError(
                f"{path}: changed since the run in {folder} started (sha256 {saved[path][:12]} then, {sha256[:12]} "
                "now). Restore the file, or choose another --out."
            )


def write_result(folder: Path, result: dict[str, Any], accelerator: Accelerator) -> None:
    """Write result.json, which marks the run as finished. Collective.

    `environment` in it is that of the run's last start, with those before under `earlier`.
    """
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            check_fence(folder)
            *earlier, last = _earlier_starts(folder / ENVIRONMENT) or [{}]
            ranks = {"world_size": accelerator.num_processes, "precision": accelerator.mixed_precision}
            write_json(folder / "result.json", result | ranks | {"environment": last | {"earlier": earlier}})


def _record_environment(folder: Path, accelerator: Accelerator, resumes: bool) -> None:
    """Add this start of the run to environment.json, and save its uncommitted changes as a diff. Collective.

    The file lists the starts of a run, oldest first. Of starts with the same source, packages, hosts and devices only
    the last is kept.
    """
    own = describe_environment(accelerator.device)
    ranks = gather_object([(own["node"], own["device"])])
    nodes: dict[str, list[str]] = {}
    for node, device in ranks:
        nodes.setdefault(node, []).append(device)
    if not accelerator.is_main_process or is_finished(folder):
        return
    start = own | {"nodes": nodes}
    earlier = _earlier_starts(folder / ENVIRONMENT) if resumes else []
    write_json(folder / ENVIRONMENT, [each for each in earlier if _without_job(each) != _without_job(start)] + [start])
    diff = source().diff
    if diff and len(diff) <= DIFF_LIMIT:
        write_bytes(folder / f"changes-{source().sha256[:8]}.diff", diff)


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts in environment.json; set a damaged one aside, because the run does not depend on it."""
    try:
        starts = read_json(path) if path.is_file() else []
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
        reason = "expected a list of starts"
    except InvalidJson as error:
        reason = str(error.__cause__)
    damaged = path.with_name(f"{path.name}.damaged")
    path.rename(damaged)
    logger.warning("%s: is damaged (%s); kept as %s, and a new one is started", path, reason, damaged.name)
    return []


def _without_job(start: dict[str, Any]) -> dict[str, Any]:
    """Return `start` as read from JSON, without its time and Slurm job."""
    return json.loads(json.dumps({key: value for key, value in start.items() if key not in ("started", "slurm")}))
