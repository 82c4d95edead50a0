"""One rule says whether a stage is done: the same inputs, and outputs as they were written."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import link, write_json, write_text
from mgcc_dist.common.options import neutral
from mgcc_dist.common.stages import Stage, all_done, is_done, run_stages


@dataclass(frozen=True)
class Settings:
    scale: int = 1
    workers: int = neutral(2)


def stage(folder: Path, settings: Settings, name: str = "double") -> Stage:
    def run() -> None:
        text = (folder / "in.txt").read_text()
        write_text(folder / name / "out.txt", text * settings.scale)

    return Stage(name, folder, {"settings": settings, "text": folder / "in.txt"}, (f"{name}/out.txt",), run)


def edit(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in.txt").write_text("a")
    run_stages([stage(tmp_path, Settings())], Accelerator(cpu=True))
    return tmp_path


def test_a_finished_stage_is_done_and_not_run_again(folder, caplog):
    done = replace(stage(folder, Settings(workers=8)), run=lambda: pytest.fail("ran again"))
    with caplog.at_level("INFO"):
        run_stages([done], Accelerator(cpu=True))
    assert f"double: {folder}/double/out.txt already exists" in caplog.text
    assert all_done([done], Accelerator(cpu=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "in.txt").write_text("b"),
        lambda folder: (folder / "double" / "out.txt").unlink(),
        lambda folder: (folder / "stages" / "double.json").unlink(),
        lambda folder: (folder / "stages" / "double.json").write_text("{"),
        lambda folder: edit(folder / "stages" / "double.json", outputs=["double/out.txt"]),
        lambda folder: edit(folder / "stages" / "double.json", inputs=None),
    ],
    ids=["input", "output", "fingerprint", "damaged fingerprint", "edited outputs", "edited inputs"],
)
def test_a_stage_runs_again_after_its_input_output_or_fingerprint_changed(folder, change):
    change(folder)
    again = stage(folder, Settings())
    assert not is_done(again)
    run_stages([again], Accelerator(cpu=True))
    assert is_done(again)
    assert (folder / "double" / "out.txt").read_text() == (folder / "in.txt").read_text()


def test_another_setting_counts_only_if_it_affects_the_result(folder):
    assert is_done(stage(folder, Settings(workers=0)))
    assert not is_done(stage(folder, Settings(scale=2)))


def test_an_output_that_was_changed_is_named_and_kept(folder):
    path = folder / "double" / "out.txt"
    path.write_text("mine")
    with pytest.raises(UserError, match=rf"^{path}: is damaged, or was changed since stage double wrote it\. .* move"):
        run_stages([stage(folder, Settings())], Accelerator(cpu=True))
    assert path.read_text() == "mine"


def test_a_stage_follows_what_another_stage_was_made_from(folder):
    def following(scale: int) -> Stage:
        first = stage(folder, Settings(scale))
        return Stage("next", folder, {"first": first}, (), lambda: None)

    run_stages([following(1)], Accelerator(cpu=True))
    assert is_done(following(1))
    assert not is_done(following(2))


def test_a_shard_folder_is_done_with_its_index_and_may_lose_records_later(tmp_path):
    def run() -> None:
        write_json(tmp_path / "samples" / "index.json", {"shards": [1, 2]})

    sampled = Stage("samples", tmp_path, {"seed": 1}, ("samples",), run)
    assert not is_done(sampled)
    run_stages([sampled], Accelerator(cpu=True))
    write_json(tmp_path / "samples" / "index.json", {"shards": [1]})
    assert is_done(sampled)
    (tmp_path / "samples" / "index.json").unlink()
    assert not is_done(sampled)


def test_a_stage_that_fails_leaves_no_fingerprint(tmp_path):
    def run() -> None:
        write_text(tmp_path / "out.txt", "half")
        raise UserError("disk full")

    failing = Stage("fails", tmp_path, {}, ("out.txt",), run)
    with pytest.raises(UserError, match="disk full"):
        run_stages([failing], Accelerator(cpu=True))
    assert not is_done(failing)
    assert not failing.fingerprint.exists()


def test_the_fingerprint_says_what_inputs_and_outputs_hold(folder):
    saved = json.loads((folder / "stages" / "double.json").read_text())
    assert saved["inputs"] == {"settings": {}, "text": saved["outputs"]["double/out.txt"]}


def test_a_link_shares_the_file_and_keeps_its_content_when_the_source_is_replaced(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "1")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    link(tmp_path / "a", tmp_path / "b")  # again
    write_text(tmp_path / "a", "2")
    assert (tmp_path / "b").read_text() == "1"

    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("os.link", refuse)
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "2"
    assert not (tmp_path / "a").samefile(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
