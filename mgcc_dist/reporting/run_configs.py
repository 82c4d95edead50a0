"""Read the configs of the runs of a report. Those of a sweep are parsed and checked once, because this takes
milliseconds: they differ only in seed and folder."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mgcc_dist.common.config import SAFE_LOADER
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.train.saved_run import read_config

OWN_LINES = re.compile(r"^(?:out|  seed): (.*)$", re.MULTILINE)
"""of a config.yaml, with what a run has for itself"""


class RunConfigs:
    def __init__(self) -> None:
        self._parsed: dict[str, dict[str, Any]] = {}
        """by their text without seed and folder"""
        self._checked: dict[str, SegmentConfig] = {}
        """by their content without seed and folder"""

    def read(self, path: Path) -> dict[str, Any]:
        """Return the content of a config.yaml; {} if there is none.

        Raises:
            UserError: it is damaged.
        """
        if not path.is_file():
            return {}
        try:
            text = path.read_text()
            own, others = _own_values(text), OWN_LINES.sub("", text)
            if len(own) == 2 and (known := self._parsed.get(others)):
                return {**known, "out": own[1], "loop": {**known["loop"], "seed": own[0]}}
            config: Any = yaml.load(text, SAFE_LOADER) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML ({reason_of(error)}). Restore it.") from error
        if not isinstance(config, dict) or not isinstance(config.get("data", {}), dict):
            raise UserError(f"{path}: not a run's config. Restore it.")
        if _seed_and_folder(config) == own:
            self._parsed[others] = config
        return config

    def check(self, folder: Path, config: dict[str, Any]) -> SegmentConfig | None:
        """Return the config of the segmentation run in `folder`; None if it has none, or this version can't read it.

        Args:
            config: what `read` returned
        """
        if not config:
            return None
        seed, out = _seed_and_folder(config)
        others = ""
        if type(seed) is int and isinstance(out, str):
            others = json.dumps({**config, "out": None, "loop": {**config["loop"], "seed": None}}, default=str)
            if known := self._checked.get(others):
                return replace(known, out=out, loop=replace(known.loop, seed=seed))
        try:
            found = read_config(folder, SegmentConfig)
        except UserError:
            return None
        if others:
            self._checked[others] = found
        return found


def _own_values(text: str) -> list[Any]:
    with suppress(yaml.YAMLError):  # a value of several lines
        return [yaml.load(value, SAFE_LOADER) for value in OWN_LINES.findall(text)]
    return []


def _seed_and_folder(config: dict[str, Any]) -> list[Any]:
    loop = config.get("loop")
    return [loop.get("seed") if isinstance(loop, dict) else None, config.get("out")]
