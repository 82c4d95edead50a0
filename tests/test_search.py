"""Searches: checks of the space, trials that are complete, pruned, killed and resumed, and the best preset."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

optuna = pytest.importorskip("optuna")

from mgcc_dist import sweeps  # noqa: E402
from mgcc_dist.common.command_line import parse  # noqa: E402
from mgcc_dist.common.config import CONFIGS  # noqa: E402
from mgcc_dist.common.errors import EXIT_STOPPED, UserError  # noqa: E402
from mgcc_dist.methods.segment_config import SegmentConfig  # noqa: E402
from mgcc_dist.search import main as search_main  # noqa: E402
from mgcc_dist.slurm import job_graph  # noqa: E402
from mgcc_dist.sweep import worker  # noqa: E402
from mgcc_dist.sweep.expansion import read_sweep  # noqa: E402
from mgcc_dist.sweep.worker import SearchWorker, open_study  # noqa: E402

SPACE = {
    "loop.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
    "network.widths": {"choices": [[4, 8], [8, 16]]},
}
# Stands in for a training run: three validations whose score is the learning rate, then the result.
PROGRAM = """
import json, os, signal, sys, time, yaml
from pathlib import Path
config = yaml.safe_load(Path(sys.argv[1]).read_text())
out, rate = Path(config["out"]), config["loop"]["learning_rate"]
signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
rows = out / "metrics.jsonl"
done = len(rows.read_text().splitlines()) if rows.is_file() else 0
for step in range(done + 1, 4):
    with rows.open("a") as file:
        file.write(json.dumps({"split": "validation", "step": step, "iou": rate}) + "\\n")
    if (out.parent / "pause").is_file():
        (out / "paused").touch()
        time.sleep(60)
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
if (out.parent / "crash").is_file():
    os.kill(os.getpid(), signal.SIGKILL)
(out / "result.json").write_text(json.dumps({"best": {"summary": {"corrected": {"iou": rate}}}}))
"""

# A worker that claims a trial and does nothing.
CLAIM = """
import sys
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.sweep.worker import SearchWorker
claimed = SearchWorker(read_sweep(sys.argv[1]).search, 1)._next_trial()
print("claimed", flush=True)
sys.stdin.read()
"""


def sweep_of(folder, space=SPACE, study=(), **changes):
    search = {
        "row": "U-Net",
        "dataset": "BUSI",
        "space": space,
        "study": {"trials": 3, "pruner": "none", **dict(study)},
    }
    content = {
        "title": "a search",
        "out": str(folder / "out"),
        "preset": "mgcc_busi_small",
        "seeds": [],
        "datasets": {"BUSI": {"data": {"split": "busi_random_{split}"}}},
        "rows": {
            "U-Net": {"network": {"name": "unet"}, "method": {"name": "supervised"}, "data": {"batch_unlabeled": 0}}
        },
        "search": {**search, **changes},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Let trials run PROGRAM instead of `segment`."""
    (tmp_path / "program.py").write_text(PROGRAM)
    start = subprocess.Popen

    def popen(words, **keywords):
        assert words[1:4] == ["-m", "mgcc_dist.segment", "--config"]
        return start([sys.executable, str(tmp_path / "program.py"), words[4]], **keywords)

    monkeypatch.setattr(worker, "Popen", popen)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)


def trials_of(search):
    return [(trial.state.name, trial.values and trial.value) for trial in open_study(search).trials]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_best_trial_becomes_a_preset(tmp_path, program, storage, sampler):
    search = read_sweep(sweep_of(tmp_path, study={"storage": storage, "sampler": sampler})).search
    SearchWorker(search, 0).run()
    values = [value for _, value in trials_of(search)]
    assert len(set(values)) == 3
    best = search.folder / "best.yaml"
    assert f"iou {max(values):.4f}, the best of 3 complete trials" in best.read_text()
    config = parse(SegmentConfig, ["--config", str(best)], CONFIGS / "segment")
    assert (config.loop.learning_rate, config.network.name) == (max(values), "unet")
    assert config.network.widths in ((4, 8), (8, 16))
    assert yaml.safe_load(best.read_text())["base"] == "mgcc_busi_small"
    SearchWorker(search, 1).run()  # nothing is left to do
    assert len(trials_of(search)) == 3
    assert search.marker(1).is_file()
    more = read_sweep(sweep_of(tmp_path, study={"storage": storage, "sampler": sampler, "trials": 5})).search
    SearchWorker(more, 0).run()
    assert len({value for _, value in trials_of(more)}) == 5


def test_a_grid_has_each_combination_once(tmp_path, program):
    space = {"loop.learning_rate": {"choices": [0.1, 0.2]}, "loop.warmup_steps": {"low": 0, "high": 10, "step": 5}}
    search = read_sweep(sweep_of(tmp_path, space=space, study={"sampler": "grid", "trials": 50})).search
    SearchWorker(search, 0).run()
    assert len({tuple(trial.params.items()) for trial in open_study(search).trials}) == 6
    assert [state for state, _ in trials_of(search)] == ["COMPLETE"] * 6


def test_a_bad_trial_is_pruned_by_its_validations(tmp_path, program, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    study = {"pruner": "median", "trials": 9, "sampler": "random"}
    search = read_sweep(sweep_of(tmp_path, study=study)).search
    SearchWorker(search, 0).run()
    states = [state for state, _ in trials_of(search)]
    assert states[:5] == ["COMPLETE"] * 5  # MedianPruner's startup trials
    assert "PRUNED" in states
    pruned = [trial for trial in open_study(search).trials if trial.state.name == "PRUNED"]
    assert all(trial.intermediate_values for trial in pruned)


def test_a_signalled_worker_saves_its_trial_and_the_next_one_resumes_it(tmp_path, program):
    search = read_sweep(sweep_of(tmp_path)).search
    search.folder.mkdir(parents=True)
    (search.folder / "pause").touch()

    def send():
        while not (search.folder / "trial_0000" / "paused").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stopped:
        SearchWorker(search, 0).run()
    assert stopped.value.code == EXIT_STOPPED
    assert trials_of(search) == [("RUNNING", None)]
    (search.folder / "pause").unlink()
    rate = open_study(search).trials[0].params["loop.learning_rate"]
    SearchWorker(search, 1).run()
    assert [state for state, _ in trials_of(search)] == ["COMPLETE"] * 3
    assert trials_of(search)[0][1] == rate
    assert (search.folder / "trial_0000" / "metrics.jsonl").read_text().count("validation") == 3


def test_a_worker_that_is_signalled_between_trials_is_not_done(tmp_path, program):
    search = read_sweep(sweep_of(tmp_path)).search
    stopped = SearchWorker(search, 0)
    stopped.stopped = True
    with pytest.raises(SystemExit) as exit:
        stopped.run()
    assert exit.value.code == EXIT_STOPPED
    assert not search.marker(0).exists()
    assert trials_of(search) == []


def test_a_trial_that_keeps_crashing_fails_and_is_not_repeated(tmp_path, program):
    search = read_sweep(sweep_of(tmp_path, study={"trials": 1})).search
    search.folder.mkdir(parents=True)
    (search.folder / "crash").touch()
    with pytest.raises(UserError, match=r"out/search: no trial is complete\. See trial_\*/log\.txt"):
        SearchWorker(search, 0).run()
    assert trials_of(search) == [("FAIL", None)]
    assert open_study(search).trials[0].user_attrs["attempts"] == worker.ATTEMPTS


def test_two_workers_never_run_the_same_trial(tmp_path, program):
    search = read_sweep(sweep_of(tmp_path, study={"trials": 2})).search
    words = [sys.executable, "-c", CLAIM, str(search.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        SearchWorker(search, 0).run()
        assert [state for state, _ in trials_of(search)] == ["RUNNING", "COMPLETE"]
        other.kill()  # its trial is free now
    SearchWorker(search, 0).run()
    assert [state for state, _ in trials_of(search)] == ["COMPLETE", "COMPLETE"]


def test_workers_are_an_array_of_tasks(tmp_path):
    sweep = read_sweep(sweep_of(tmp_path, workers=3, resources={"cpus": 3}))
    tasks = job_graph.build_tasks(sweep, {}, "")
    assert [task.command[-3:] for task in tasks] == [[str(sweep.path), "--worker", str(k)] for k in range(3)]
    (job,) = job_graph.build_jobs(tasks, [], 1000, "x")
    assert (len(job.tasks), job.resources.cpus) == (3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": "Unet"}, r"search\.row: 'Unet' is not in this sweep\. Choose one of U-Net"),
        ({"rows": "U-Net"}, r"search: rows: unknown key\. Did you mean row\?"),
        ({"study": {"sampler": "grid"}}, r"search\.space\.loop\.learning_rate: a grid needs choices or a step"),
        ({"study": {"sampler": "tpee"}}, r"search: study\.sampler: expected one of tpe, random, grid"),
        ({"space": {}}, r"search\.space must be a mapping"),
        ({"space": {"loop.learning_rat": {"low": 1, "high": 2}}}, r"search\.space: loop\.learning_rat: unknown key"),
        ({"space": {"loop.learning_rate": {"low": -1, "high": 2}}}, r"search\.space: loop\.learning_rate: expected"),
        ({"space": {"loop.learning_rate": {"low": 3, "high": 2}}}, r"loop\.learning_rate: low must be below high"),
        ({"space": {"loop.learning_rate": {"min": 3, "high": 2}}}, r"loop\.learning_rate must have low and high"),
        ({"space": {"network.widths": {"choices": [[4, 8], 5]}}}, r"search\.space: network\.widths: expected"),
    ],
)
def test_a_wrong_search_is_refused_with_its_key(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(sweep_of(tmp_path, **changes))
    assert str(tmp_path / "search.yaml") in str(caught.value)


def test_the_command_of_a_search_is_printed(tmp_path, capsys):
    path = sweep_of(tmp_path)
    sweeps.main([str(path)])
    assert capsys.readouterr().out == f"{sys.executable} -m mgcc_dist.search {path}\n"
    with pytest.raises(UserError, match="table_1: has no `search`"):
        search_main(["table_1"])


def test_bounds_may_be_written_with_an_exponent(tmp_path):
    path = sweep_of(tmp_path)
    path.write_text(path.read_text().replace("low: 0.001", "low: 1e-3"))
    assert read_sweep(path).search.space["loop.learning_rate"].low == 0.001
    assert json.dumps(read_sweep(path).search.as_preset(read_sweep(path).search.base))
