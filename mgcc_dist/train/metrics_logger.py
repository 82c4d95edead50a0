"""Metrics of a training run: `metrics.jsonl`, a copy in its tracker and a progress bar, all on the main process."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgcc_dist.common.files import write_text
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.train.trackers import TrackedRun, TrackerName

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLogger:
    """Rows of metrics. A resumed run drops the rows after its checkpoint's step, so that no step is logged twice."""

    def __init__(
        self,
        name: str,
        folder: Path,
        step: int,
        total_steps: int,
        accelerator: "Accelerator",
        tracker: TrackerName = "tensorboard",
    ) -> None:
        self._main = accelerator.is_main_process
        if not self._main:
            return
        path = folder / "metrics.jsonl"
        write_text(path, "".join(line + "\n" for line in _lines_until(path, step)))
        self._file = path.open("a")
        self._tracker = TrackedRun(tracker, folder, step)
        self._bar = ProgressBar(total_steps, name, "steps", initial=step)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, split: str, step: int, epoch: float, values: dict[str, float], **not_plotted: Any) -> None:
        """Append a row {"step", "epoch", "split", **values, **not_plotted}; `values` also go to the tracker."""
        if not self._main:
            return
        row = {"step": step, "epoch": round(epoch, 4), "split": split, **values, **not_plotted}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._tracker.log(split, step, values)
        shown = "loss" if "loss" in values else next(iter(values))
        self._bar.show(**{shown if split == "train" else f"val_{shown}": values[shown]})

    def advance(self) -> None:
        """Count one step as done."""
        if self._main:
            self._bar.update()

    def close(self) -> None:
        if self._main:
            self._bar.close()
            self._file.close()
            self._tracker.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without damaged lines, such as a last one that a kill cut short."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):  # also if it is not text
            row = json.loads(line)
            valid = isinstance(row, dict) and isinstance(row.get("step"), int)
            if valid and isinstance(row.get("epoch", 0), (int, float)):
                rows.append(row)
    return rows


def _lines_until(path: Path, step: int) -> list[str]:
    return [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
