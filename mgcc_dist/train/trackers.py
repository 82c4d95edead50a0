"""Experiment trackers: a run's metrics, config and pictures in TensorBoard, MLflow, Weights & Biases or trackio.

MLflow, Weights & Biases and trackio are driven through Accelerate's trackers. Addresses and credentials are read by the
trackers themselves, from their environment variables and files (`MLFLOW_TRACKING_URI`, `WANDB_API_KEY`, `WANDB_MODE`),
and never stored here.

`metrics.jsonl` is the record of a run; a tracker is a copy of it. It works in a thread of its own, so a slow server
does not hold up training, and after its first error the run continues without it. `tracker.json` in the run folder
holds the id under which a resumed run continues, and the last step of each split that was sent, so no step is sent
twice.
"""

import logging
import queue
import re
import threading
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from mgcc_dist.common.config import flatten, read_yaml
from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import read_object, write_json

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio", "none"]
STATE = "tracker.json"
PROJECT = "mgcc-dist"
"""project or experiment, unless the tracker's own environment variable names one"""
QUEUE_SIZE = 10_000
CLOSE_TIMEOUT = 60.0
"""seconds that the end of a run waits for its tracker"""


class Tracker(Protocol):
    """One run in a tracker. Any method may fail or take long."""

    run_id: str
    keeps_rows_of_killed_runs: bool
    """whether rows after the checkpoint of a resumed run are still there, so they must not be sent again"""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


def check_tracker(name: TrackerName) -> None:
    """Raise a UserError unless the package of the tracker is installed."""
    if name not in ("none", "tensorboard") and find_spec(name) is None:
        package = name if name == "trackio" else "'mgcc-dist[trackers]'"
        raise UserError(
            f"loop.tracker: {name} is not installed. Run `pip install {package}`, or choose another tracker."
        )


class TrackedRun:
    """The copy of a run in its tracker; with the tracker "none", nothing. Errors are logged once and never raised.

    Args:
        folder: run folder; its config.yaml is sent as the run's parameters.
        step: last step of the checkpoint from which the run resumes.
    """

    def __init__(self, name: TrackerName, folder: Path, step: int) -> None:
        self._name, self._folder, self._step = name, folder, step
        self._queue: queue.Queue[tuple[Any, ...] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._failed = name == "none"
        if not self._failed:
            self._thread.start()

    def log(self, split: str, step: int, values: Mapping[str, float]) -> None:
        self._put(("log", split, step, dict(values)))

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._put(("log_image", name, path, step))

    def close(self) -> None:
        """Wait until everything is sent, but not for longer than CLOSE_TIMEOUT."""
        if self._name == "none":
            return
        self._put(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("%s: did not finish within %.0f s; its last rows may be missing", self._name, CLOSE_TIMEOUT)

    def _put(self, call: tuple[Any, ...] | None) -> None:
        """Pass a call to the tracker's thread; None ends it."""
        if self._failed:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._give_up("does not keep up with the run")

    def _give_up(self, reason: str) -> None:
        self._failed = True
        logger.warning(
            "%s: %s. The run continues without it; %s has all rows.",
            *(self._name, reason.rstrip("."), self._folder / "metrics.jsonl"),
        )

    def _work(self) -> None:
        try:
            state = _read_state(self._folder)
            own = state.setdefault(self._name, {"run": None, "steps": {}})
            tracker = _open(self._name, self._folder, own["run"], self._step)
            own["run"] = tracker.run_id
            write_json(self._folder / STATE, state)
            while (call := self._queue.get()) and not self._failed:
                if call[0] == "log_image":
                    tracker.log_image(*call[1:])
                    continue
                _, split, step, values = call
                if tracker.keeps_rows_of_killed_runs and step <= own["steps"].get(split, 0):
                    continue
                tracker.log({f"{split}/{key}": value for key, value in values.items()}, step)
                if tracker.keeps_rows_of_killed_runs:
                    own["steps"][split] = step
                    write_json(self._folder / STATE, state)
            tracker.close()
        except UserError as error:  # a damaged tracker.json
            self._give_up(str(error))
        except (Exception, SystemExit) as error:  # SystemExit: wandb's, without a key and a terminal
            self._give_up(f"{type(error).__name__}: {reason_of(error)}")


def track_images(name: TrackerName, folder: Path, step: int, images: Mapping[str, Path]) -> None:
    """Add pictures of a finished run to its tracker."""
    run = TrackedRun(name, folder, step)
    for image, path in images.items():
        if path.is_file():
            run.log_image(image, path, step)
    run.close()


def _read_state(folder: Path) -> dict[str, Any]:
    return read_object(folder / STATE) if (folder / STATE).is_file() else {}


def _open(name: TrackerName, folder: Path, run_id: str | None, step: int) -> Tracker:
    if name == "tensorboard":
        return _TensorBoard(folder, step)
    return _AccelerateTracker(name, folder, run_id)


class _TensorBoard:
    """Event files in `tensorboard/`. Unlike Accelerate's tracker it removes the rows after a resumed run's checkpoint:
    those that a killed process wrote may not all have reached the disk, so all are written again."""

    keeps_rows_of_killed_runs = False

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = "tensorboard"
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._writer.add_image(name, _pixels(path), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _AccelerateTracker:
    """A run in MLflow, Weights & Biases or trackio."""

    keeps_rows_of_killed_runs = True

    def __init__(self, name: TrackerName, folder: Path, run_id: str | None) -> None:
        from accelerate.tracking import MLflowTracker, TrackioTracker, WandBTracker

        run_name, group = describe_run(folder)
        resumes, run_id = run_id is not None, run_id or uuid.uuid4().hex[:12]
        if name == "mlflow":
            tags = {"folder": str(folder), **({"group": group} if group else {})}
            self._tracker: Any = MLflowTracker(
                PROJECT, run_id=run_id if resumes else None, run_name=run_name, tags=tags
            )
        elif name == "wandb":
            self._tracker = WandBTracker(
                PROJECT, id=run_id, name=run_name, group=group, dir=str(folder), resume="allow"
            )
        else:
            self._tracker = TrackioTracker(PROJECT, name=f"{run_name}-{run_id}", group=group, resume="allow")
        self._name = name
        self._tracker.start()
        self.run_id = self._tracker.tracker.info.run_id if name == "mlflow" else run_id
        config = folder / "config.yaml"
        if config.is_file() and not (resumes and name == "mlflow"):  # which refuses to change a parameter
            keys = flatten(read_yaml(config.read_text(), str(config)))
            self._tracker.store_init_configuration({key: _without_secrets(value) for key, value in keys.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        if self._name == "mlflow":
            self._tracker.log_artifact(str(path), artifact_path=name)
        elif self._name == "wandb":
            self._tracker.log_images({name: [_pixels(path)]})  # at the newest step: older ones are refused
        else:
            logger.debug("%s: not sent, because trackio is given metrics only", path)

    def close(self) -> None:
        self._tracker.finish()


def describe_run(folder: Path) -> tuple[str, str | None]:
    """Return a run's name and group. Runs of a sweep, in OUT/DATASET/ROW/seed_K-HASH, are grouped by OUT/DATASET."""
    parts = folder.resolve().parts
    group = "/".join(parts[-4:-2]) if re.fullmatch(r"seed_\d+-[0-9a-f]+", parts[-1]) else None
    return "/".join(parts[-2:]), group


def _without_secrets(value: Any) -> str:
    """Return a config value without the passwords of URLs, and without their queries, which may hold a signature."""
    return re.sub(r"(\w://)(?:[^/\s]+@)?([^\s?'\",]*)(?:\?[^\s'\",]*)?", r"\1\2", str(value))


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
