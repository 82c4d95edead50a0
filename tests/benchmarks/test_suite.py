"""The benchmark suite: its stages really run at toy size, and one that fails or takes too long costs only itself."""

import argparse
import json
import math
import os
import runpy
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch

from benchmarks import suite as program
from benchmarks.collect import collected
from benchmarks.compare import metrics
from benchmarks.stages import STAGES, Context, Stage, modules
from benchmarks.suite import START_SECONDS, Suite
from mgcc_dist.bench.config import BenchConfig
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.files import read_json
from mgcc_dist.kernels import TABLE_PATH

IMAGES, SHARDS = Path("images"), Path("shards")


class ForkedChild:
    """A `Child` that is forked from a process that has imported all libraries."""

    timed_out = False

    def __init__(self, command, seconds, grace, log):
        self.started, self.log = time.monotonic(), log
        self.process = ranks.start(ranks.forked(1), command[1:])

    def wait(self):
        self.log.write_text("".join(self.process.communicate()))
        return self.process.returncode


def test_the_quick_suite_runs_its_stages_on_a_cpu(tmp_path, monkeypatch):
    stages = ["gpu_tests", "train_step", "training_run"]
    words = ["suite", "--quick", "--seconds", "900", "--out", str(tmp_path), "--stages", *stages]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(program, "Child", ForkedChild)
    monkeypatch.setattr(program, "raise_on_sigterm", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in program.ENVIRONMENT.items():  # which the suite sets for its stages
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        program.main()
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert ended.value.code == 0, logs
    summary = read_json(tmp_path / "summary.json")
    assert {name: row["status"] for name, row in summary["stages"].items()} == {
        name: "skipped" if name == "gpu_tests" else "ran" for name in stages
    }
    for name in stages:
        row = summary["stages"][name]
        assert row["command"].startswith("python -m ")
        if name != "gpu_tests":
            assert row["seconds"] > 0
            assert metrics(read_json(tmp_path / row["result"]))
    text = (tmp_path / "summary.md").read_text()
    assert "| gpu_tests | skipped |" in text
    assert "toy sizes" in text
    assert read_json(tmp_path / "train_step.json")["rows"]["channels_last"]["steps_per_second"] > 0
    assert read_json(tmp_path / "training_run.json")["rows"]["MGCC"]["finished"]
    assert (tmp_path / "training_run" / "result.json").is_file()
    content = collected(tmp_path)
    assert list(content["not_run"]) == ["gpu_tests"]
    assert "train_step / eager / steps_per_second" in metrics(content)


class Parsed(BaseException):
    """Ends a program once its options are parsed."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", STAGES)
def test_programs_accept_the_options_of_their_stage(name, quick, cuda, tmp_path, monkeypatch):
    context = Context(tmp_path, tmp_path, cuda, quick, shards=SHARDS, images=IMAGES, total_seconds=500)
    module, *words = STAGES[name].command(replace(context, modules=("json",)), 100)
    if module == "mgcc_dist.bench":
        assert parse(BenchConfig, words).op == name.removeprefix("kernels_")
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(self, *args):
        parse_args(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize(("cuda", "quick"), [(True, True), (False, True), (False, False)])
def test_only_a_full_suite_on_a_gpu_changes_the_table_that_auto_reads(cuda, quick, tmp_path):
    context = Context(tmp_path, tmp_path, cuda, quick)
    assert str(tmp_path / "measured.json") in STAGES["kernels_msag"].command(context, 100)
    on_gpu = replace(context, cuda=True, quick=False)
    assert str(TABLE_PATH) in STAGES["kernels_msag"].command(on_gpu, 100)


def fake(name, code, **options):
    """A stage of `timeit`, which runs `code` once."""
    defaults = {"share": 1, "least": 1, "most": 30, "grace": 1}
    return Stage(name, "", lambda context, seconds: ["timeit", "-n1", "-r1", code], **(defaults | options))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a suite with so many seconds left."""
    monkeypatch.setattr(program, "START_SECONDS", 0)
    context = Context(tmp_path, tmp_path, cuda=False, quick=False)
    return lambda seconds: Suite(context, time.monotonic() + seconds + program.SUMMARY_SECONDS)


def test_stages_that_fail_hang_or_need_what_is_missing_do_not_stop_the_others(make, tmp_path):
    suite = make(60)
    suite.run(
        [
            fake("fails", "print('one'); raise SystemExit('no such option')"),
            fake("hangs", "import time; time.sleep(60)", most=1.2),
            fake("ignores_sigterm", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", most=2.5),
            fake("needs_gpu", "pass", needs=lambda context: "needs a CUDA device"),
            fake("too_long", "pass", least=1000),
            fake("works", f"import pathlib; pathlib.Path('{tmp_path}/works.json').write_text('result')"),
        ]
    )
    stages = read_json(tmp_path / "summary.json")["stages"]
    assert {name: row["status"] for name, row in stages.items()} == {
        "fails": "failed",
        "hangs": "failed",
        "ignores_sigterm": "failed",
        "needs_gpu": "skipped",
        "too_long": "skipped",
        "works": "ran",
    }
    assert stages["fails"]["reason"] == "exit status 1: SystemExit: no such option"
    assert "its share of the time" in stages["hangs"]["reason"]
    assert stages["ignores_sigterm"]["seconds"] < 30
    assert stages["needs_gpu"]["reason"] == "needs a CUDA device"
    assert stages["too_long"]["reason"].endswith("needs 1000 s")
    assert stages["works"]["result"] == "works.json"
    assert (tmp_path / "fails.log").read_text().startswith("one")


def test_a_background_stage_runs_alongside_the_next_one(make, tmp_path):
    meet = """import pathlib, time
pathlib.Path('{0}/{1}').touch()
while not pathlib.Path('{0}/{2}').exists(): time.sleep(.01)
"""
    suite = make(60)
    suite.run(
        [
            fake("behind", meet.format(tmp_path, "a", "b"), background=True, share=0, least=30),
            fake("front", meet.format(tmp_path, "b", "a")),
            fake("after", "pass"),
        ]
    )
    assert {row["status"] for row in suite.stages.values()} == {"ran"}


def test_an_interrupted_suite_ends_its_stages_and_keeps_the_summary(make, tmp_path):
    suite = make(60)
    sleep = f"import pathlib, time; pathlib.Path('{tmp_path}/started').touch(); time.sleep(60)"

    def interrupt():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            suite.run([fake("behind", "import time; time.sleep(60)", background=True), fake("front", sleep)])
    finally:
        signal.signal(signal.SIGINT, before)
    stages = read_json(tmp_path / "summary.json")["stages"]
    assert {name: row["reason"] for name, row in stages.items()} == {"behind": "interrupted", "front": "interrupted"}


def test_time_is_shared_and_what_a_stage_leaves_falls_to_later_ones(make):
    a, b, c = fake("a", "", share=1, most=20), fake("b", "", share=1, most=math.inf, least=60), fake("c", "", share=2)
    suite = make(100)
    assert suite.seconds_for(a, [a, b, c]) == 20  # at most
    assert suite.seconds_for(c, [c, b]) == pytest.approx(30)
    assert suite.seconds_for(b, [b, c]) == pytest.approx(60, abs=1)  # at least
    assert suite.seconds_for(b, [b]) == pytest.approx(100, abs=1)  # all the rest
    missing = replace(c, needs=lambda context: "needs a CUDA device")
    assert suite.seconds_for(b, [b, missing]) == pytest.approx(100, abs=1)


def test_a_later_call_keeps_the_stages_of_an_earlier_one(make, tmp_path):
    make(60).run([fake("first", "pass"), fake("second", "raise SystemExit(1)")])
    make(60).run([fake("second", "pass")])
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert {name: row["status"] for name, row in stages.items()} == {"first": "ran", "second": "ran"}
    assert "reason" not in stages["second"]


def test_commands_get_less_time_than_their_stage(tmp_path):
    context = Context(tmp_path, tmp_path, cuda=False, quick=False)
    received = []

    def command(context, seconds):
        received.append(seconds)
        return ["timeit", "-n1", "-r1", "pass"]

    suite = Suite(context, time.monotonic() + 60)
    suite.start(Stage("a", "", command, share=1, least=1, grace=10), seconds=40)
    assert received == [40 - 10 - START_SECONDS]


def test_the_environment_stage_imports_the_modules_of_all_stages(tmp_path):
    context = Context(tmp_path, tmp_path, cuda=False, quick=False)
    assert {"benchmarks.train_step", "mgcc_dist.bench"} <= set(modules(STAGES.values(), context))
