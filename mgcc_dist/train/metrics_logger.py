"""What a run writes while it goes: `metrics.jsonl`, TensorBoard events, one progress bar; all on the main process."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mgcc_dist.common.files import write_text


class MetricsLogger:
    """Rows of metrics. A resumed run drops the rows after its checkpoint's step, so that no step stands twice."""

    def __init__(self, name: str, folder: Path, step: int, total_steps: int, accelerator: Accelerator) -> None:
        self._main = accelerator.is_main_process
        if not self._main:
            return
        path = folder / "metrics.jsonl"
        write_text(path, "".join(line + "\n" for line in _lines_until(path, step)))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=total_steps, initial=step, desc=name, unit="step", dynamic_ncols=True)

    def write(self, split: str, step: int, epoch: float, values: dict[str, float], **unlogged: Any) -> None:
        """Append a row: {"step", "epoch", "split", **values, **unlogged}; `values` also go to TensorBoard."""
        if not self._main:
            return
        row = {"step": step, "epoch": round(epoch, 4), "split": split, **values, **unlogged}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(f"{split}/{key}", value, step)
        shown = {key: f"{value:.4g}" for key, value in list(values.items())[:3]}
        self._bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        if self._main:
            self._bar.update()

    def close(self) -> None:
        if self._main:
            self._bar.close()
            self._board.close()
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _lines_until(path: Path, step: int) -> list[str]:
    return [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
