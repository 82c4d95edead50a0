"""The stages of a program: what each reads and writes, and whether it is done.

A finished stage leaves a fingerprint, `FOLDER/stages/NAME.json`, with the content of its inputs and outputs. It is done
as long as the inputs are the same and the outputs exist as they were written. Otherwise it runs, which continues what
an interrupted start, or an earlier version without fingerprints, left in its outputs.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import InvalidJson, read_object, sha256_of, write_json
from mgcc_dist.common.identity import identity

logger = logging.getLogger(__name__)

FINGERPRINTS = "stages"
"""subfolder with the fingerprints"""
INDEX = "index.json"
"""file that a shard folder has once it is complete"""


@dataclass(frozen=True, eq=False)
class Stage:
    name: str
    folder: Path
    inputs: Mapping[str, Any]
    """everything that the outputs depend on. A file counts by its sha256, a shard folder by that of its index.json, a
    config by its identity (common/identity.py), another stage by its inputs, everything else as JSON"""
    outputs: Sequence[str]
    """files or shard folders in `folder`. A shard folder is done when its index.json exists; later stages may drop
    records from it"""
    run: Callable[[], object]
    """writes the outputs. Collective. It continues outputs that an earlier start left, and raises UserError if they
    belong to other settings and must not be replaced"""
    enabled: bool = True

    @property
    def fingerprint(self) -> Path:
        return self.folder / FINGERPRINTS / f"{self.name}.json"


def run_stages(stages: Sequence[Stage], accelerator: Accelerator) -> None:
    """Run the stages that are not done, in order. Collective.

    Raises:
        UserError: an output of a stage was changed since it was written, or a stage fails.
    """
    for stage in stages:
        if _on_main(lambda stage=stage: is_done(stage), accelerator):  # type: ignore[misc]
            logger.info("%s: %s already exists", stage.name, stage.folder / next(iter(stage.outputs), ""))
            continue
        inputs = _on_main(lambda stage=stage: resolve(stage.inputs), accelerator)  # type: ignore[misc]
        stage.run()
        accelerator.wait_for_everyone()
        with raise_on_all_ranks():
            if accelerator.is_main_process:
                outputs = {name: _content_of_output(stage.folder / name) for name in stage.outputs}
                write_json(stage.fingerprint, {"inputs": inputs, "outputs": outputs})


def all_done(stages: Sequence[Stage], accelerator: Accelerator) -> bool:
    """Return whether nothing is left to do, in which case the folder may be read-only. Collective."""
    return _on_main(lambda: all(map(is_done, stages)), accelerator)


def is_done(stage: Stage) -> bool:
    """Return whether the stage has its outputs, made from its present inputs.

    Raises:
        UserError: an output was changed since the stage wrote it.
    """
    saved = _read_fingerprint(stage.fingerprint)
    inputs = resolve(stage.inputs)
    if saved.get("inputs") != inputs:
        if changed := [key for key in inputs if saved and saved["inputs"].get(key) != inputs[key]]:
            logger.debug("%s: runs again, because its input %s changed", stage.name, ", ".join(changed))
        return False
    contents = {name: _content_of_output(stage.folder / name) for name in stage.outputs}
    if None in contents.values() or contents.keys() != saved["outputs"].keys():
        return False
    for name, content in contents.items():
        if content != saved["outputs"][name]:
            raise UserError(
                f"{stage.folder / name}: is damaged, or was changed since stage {stage.name} wrote it. Restore it, or "
                "move it elsewhere and rerun the same command to write it again."
            )
    return True


def _read_fingerprint(path: Path) -> dict[str, Any]:
    """Return the content of a fingerprint; {} if it does not exist or is damaged, so that the stage writes it again."""
    try:
        saved = read_object(path) if path.is_file() else {}
    except InvalidJson:
        return {}
    return saved if all(isinstance(saved.get(key), dict) for key in ("inputs", "outputs")) else {}


def resolve(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a stage's inputs, as it is saved; None for a file that does not exist."""
    return json.loads(json.dumps({key: _content_of_input(value) for key, value in inputs.items()}))


def _content_of_input(value: Any) -> Any:
    if isinstance(value, Path):
        file = value / INDEX if value.is_dir() else value
        return sha256_of(file) if file.is_file() else None
    if isinstance(value, (list, tuple)):
        return [_content_of_input(each) for each in value]
    if isinstance(value, Stage):
        return resolve(value.inputs)
    return identity(value) if dataclasses.is_dataclass(value) else value


def _content_of_output(path: Path) -> str | None:
    """Return the sha256 of a file, "complete" for a shard folder, None if it does not exist or is incomplete."""
    if path.is_dir():
        return "complete" if (path / INDEX).is_file() else None
    return sha256_of(path) if path.is_file() else None


def _on_main(compute: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Return on all ranks what `compute` returns on the main process, which alone looks at the disk. Collective."""
    result = None
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            result = compute()
    return broadcast_object_list([result])[0]
