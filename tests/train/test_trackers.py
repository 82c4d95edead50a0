"""Trackers of a run: MLflow with its SQLite store and Weights & Biases offline are the real ones."""

import json
import logging
import re
import struct
import threading

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.train import trackers
from mgcc_dist.train.metrics_logger import MetricsLogger, read_rows
from mgcc_dist.train.trackers import TrackedRun, check_tracker, describe_run, track_images


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out" / "busi" / "mgcc" / "seed_1-0123abcd"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "data:\n  shards: https://me:secr@et@host/busi?token=secret\nloop:\n  seed: 1\n"
    )
    return folder


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def write_a_killed_and_resumed_run(folder, name, accelerator):
    """Write steps 1 to 5, of which the checkpoint at step 3 keeps three, and then 4 to 6 again, and a picture."""
    with MetricsLogger("t", folder, 0, 6, accelerator, name) as logger:
        for step in range(1, 6):
            logger.write("train", step, step / 6, {"loss": 1 / step})
    with MetricsLogger("t", folder, 3, 6, accelerator, name) as logger:
        for step in range(4, 7):
            logger.write("train", step, step / 6, {"loss": 1 / step})
        logger.write("validation", 6, 1.0, {"iou": 0.5})
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "gallery.png")
    track_images(name, folder, 6, {"best": folder / "gallery.png"})


def test_mlflow_continues_the_run_and_gets_each_step_once(folder, tmp_path, monkeypatch, accelerator):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # artifacts lie in ./mlruns
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_a_killed_and_resumed_run(folder, "mlflow", accelerator)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mgcc-dist").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert run.data.metrics["validation/iou"] == 0.5
    assert run.data.params == {"data.shards": "https://host/busi", "loop.seed": "1"}
    assert run.data.tags["group"] == "out/busi"
    assert run.info.run_name == "mgcc/seed_1-0123abcd"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "best")] == ["best/gallery.png"]
    assert run.info.status == "FINISHED"
    assert "secret" not in (folder / "tracker.json").read_text()


def read_leveldb_log(content):
    """Yield the records of a .wandb file: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


def test_wandb_offline_continues_the_run_and_gets_each_step_once(folder, monkeypatch, accelerator):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_a_killed_and_resumed_run(folder, "wandb", accelerator)
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.name for path in files}) == 1  # run-ID.wandb
    steps = []
    for path in files:
        for content in read_leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "train/loss" in items:
                steps.append(json.loads(items["_step"]))
            if record.HasField("run"):
                assert record.run.run_group == "out/busi"
    assert steps == [1, 2, 3, 4, 5, 6]


def test_tensorboard_gets_the_rows_after_the_checkpoint_again(folder, accelerator, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one process and second are read in the order of their numbers as text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    write_a_killed_and_resumed_run(folder, "tensorboard", accelerator)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("best")] == [6]


class _Failing:
    run_id = "1"
    keeps_rows_of_killed_runs = True

    def log(self, values, step):
        raise OSError("no route to host")


@pytest.mark.parametrize("fails", ["at the start", "later"])
def test_a_run_continues_when_its_tracker_fails(folder, fails, monkeypatch, caplog, accelerator):
    def open_tracker(*_):
        if fails == "at the start":
            raise SystemExit("no API key")
        return _Failing()

    monkeypatch.setattr(trackers, "_open", open_tracker)
    with caplog.at_level(logging.WARNING), MetricsLogger("t", folder, 0, 9, accelerator, "wandb") as logger:
        for step in range(1, 10):
            logger.write("train", step, 0.0, {"loss": 1.0})
    assert len(read_rows(folder / "metrics.jsonl")) == 9
    (record,) = caplog.records
    assert "The run continues without it" in record.getMessage()
    assert record.getMessage().startswith("wandb: ")


def test_a_tracker_that_hangs_does_not_hold_up_the_run(folder, monkeypatch, caplog):
    begun, answers, closed = threading.Event(), threading.Event(), threading.Event()
    sent = []

    class Hanging(_Failing):
        def log(self, values, step):
            begun.set()
            answers.wait(60)
            sent.append(step)

        def close(self):
            closed.set()

    monkeypatch.setattr(trackers, "_open", lambda *_: Hanging())
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.05)
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 3)
    run = TrackedRun("mlflow", folder, 0)
    for step in range(1, 9):
        run.log("train", step, {"loss": 1.0})
        assert begun.wait(60)
    run.close()
    assert "does not keep up" in caplog.text
    assert "did not finish" in caplog.text
    answers.set()
    assert closed.wait(60)
    assert sent == [1]  # the rest is given up


def test_a_damaged_tracker_file_is_named_and_the_run_continues(tmp_path, caplog):
    (tmp_path / "tracker.json").write_text("[5")
    run = TrackedRun("tensorboard", tmp_path, 0)
    run.log("train", 1, {"loss": 1.0})
    run.close()
    [record] = [record.getMessage() for record in caplog.records if "tracker.json" in record.getMessage()]
    assert re.match(r"tensorboard: \S+tracker\.json: is not JSON .*[^.]\. The run continues without it", record)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"loop\.tracker: trackio is not installed\. Run `pip install trackio`"):
        check_tracker("trackio")
    check_tracker("tensorboard")


def test_only_runs_of_a_sweep_have_a_group(tmp_path):
    assert describe_run(tmp_path / "sweep/busi/mgcc/seed_2-00ff00ff") == ("mgcc/seed_2-00ff00ff", "sweep/busi")
    assert describe_run(tmp_path / "out/segment") == ("out/segment", None)
