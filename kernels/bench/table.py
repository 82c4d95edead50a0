"""Writing the table that `kernels/measured.py` describes and reads."""

import json
from pathlib import Path
from typing import Any

from mgcc_dist.common.files import write_json
from mgcc_dist.kernels.measured import key_of, read_rows


def write_table(path: Path, rows: list[dict[str, Any]], device: str, facts: dict[str, Any]) -> None:
    """Replace the rows of `path` that `rows`, all of `device`, measure again; `facts` says where that was."""
    new = {(key_of(row), row["batch"]): {"device": device, **row} for row in rows}
    kept = [row for row in read_rows(path) if row["device"] != device or (key_of(row), row["batch"]) not in new]
    devices = json.loads(path.read_text(encoding="utf-8"))["devices"] if path.is_file() else {}
    every = sorted((*kept, *new.values()), key=lambda row: (row["device"], *key_of(row), row["batch"]))
    write_json(path, {"devices": devices | {device: facts}, "rows": every})
