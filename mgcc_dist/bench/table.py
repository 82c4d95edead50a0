"""Write the table that `kernels/measured.py` describes and reads."""

import json
from pathlib import Path
from typing import Any

from mgcc_dist.common.files import write_json
from mgcc_dist.kernels.measured import read_rows, row_key


def write_table(path: Path, rows: list[dict[str, Any]], device: str, environment: dict[str, Any]) -> None:
    """Add `rows`, all of `device`, to `path`, replacing older measurements of the same keys and batch sizes.

    `environment` records when, where and under which load they were measured.
    """
    new = {(row_key(row), row["batch"]): {"device": device, **row} for row in rows}
    kept = [row for row in read_rows(path) if row["device"] != device or (row_key(row), row["batch"]) not in new]
    devices = json.loads(path.read_text(encoding="utf-8"))["devices"] if path.is_file() else {}
    merged = sorted((*kept, *new.values()), key=lambda row: (row["device"], *row_key(row), row["batch"]))
    write_json(path, {"devices": devices | {device: environment}, "rows": merged})
