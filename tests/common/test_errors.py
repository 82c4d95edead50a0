"""Exit codes and error lines of programs."""

import ast
import errno
import os
import re
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mgcc_dist.common.errors import EXIT_USER_ERROR, SharedError, UserError, run_program


def run_failing(error, rank, monkeypatch, capfd):
    """Exit code and stderr of a program whose `main` joins its group as `rank` and raises `error`."""
    monkeypatch.delenv("RANK", raising=False)

    def main():
        monkeypatch.setenv("RANK", rank)
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program("segment", main)
    return ended.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (UserError("data.shards: not found"), "0", "segment: data.shards: not found\n"),
        (UserError("data.shards: not found"), "1", "segment [rank 1]: data.shards: not found\n"),
        (SharedError("the loss is not finite"), "0", "segment: the loss is not finite\n"),
        (SharedError("the loss is not finite"), "1", ""),
    ],
)
def test_a_user_error_is_one_line_and_a_shared_one_comes_from_rank_0(error, rank, line, monkeypatch, capfd):
    assert run_failing(error, rank, monkeypatch, capfd) == (EXIT_USER_ERROR, line)


def test_control_characters_of_a_file_name_stay_on_one_line(monkeypatch, capfd):
    error = UserError("images/a\nb\x1b[31m.png: not a readable image")
    assert run_failing(error, "0", monkeypatch, capfd)[1] == (
        "segment: images/a\\nb\\x1b[31m.png: not a readable image\n"
    )


def test_a_missing_optional_package_is_one_line_with_the_extra(monkeypatch, capfd):
    error = ModuleNotFoundError("No module named 'submitit'", name="submitit")
    line = "segment: submitit is not installed. Run `pip install 'mgcc-dist[slurm]'`.\n"
    assert run_failing(error, "0", monkeypatch, capfd) == (EXIT_USER_ERROR, line)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_that_says_how_to_resume(number, monkeypatch, capfd):
    full = OSError(number, os.strerror(number), "out/a.tar")
    code, line = run_failing(full, "0", monkeypatch, capfd)
    assert code == EXIT_USER_ERROR
    assert line == (
        f"segment: {full}. What was saved so far is kept. Free some space and rerun the same command to resume.\n"
    )


def test_a_full_disk_that_safetensors_reports_is_one_line(monkeypatch, capfd):
    """As in diffusers' save_pretrained, which saves the autoencoder and the pipeline."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    code, line = run_failing(error, "0", monkeypatch, capfd)
    assert code == EXIT_USER_ERROR
    assert line.startswith(
        "segment: [Errno 28] No space left on device. What was saved so far is kept. Free some space"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG])
def test_a_file_that_the_system_refuses_is_one_line_with_its_name(number, monkeypatch, capfd):
    code, line = run_failing(OSError(number, os.strerror(number), "out/a.json"), "0", monkeypatch, capfd)
    assert (code, line) == (EXIT_USER_ERROR, f"segment: out/a.json: can't be read or written ({os.strerror(number)})\n")


def test_ctrl_c_where_nothing_has_to_be_saved_is_one_line(monkeypatch, capfd):
    assert run_failing(KeyboardInterrupt(), "0", monkeypatch, capfd) == (130, "segment: interrupted\n")


def test_ctrl_c_in_an_import_ends_the_program_at_once(tmp_path, monkeypatch, capfd):
    """As C extensions do, the module swallows the KeyboardInterrupt, and would be broken afterwards."""
    module = tmp_path / "interrupted_module.py"
    module.write_text("import signal\ntry:\n    signal.raise_signal(2)\nexcept KeyboardInterrupt:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended:
        run_program("segment", lambda: import_module(module.stem))
    assert (ended.value.code, capfd.readouterr().err) == (130, "segment: interrupted\n")


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "a"), OSError("?"), RuntimeError("?"), SafetensorError("?")],
)
def test_other_exceptions_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_program("segment", main)


def test_no_message_advises_to_delete_what_was_written():
    folders = [Path(__file__).parents[2] / name for name in ("mgcc_dist", "kernels", "launch", "slurm")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                assert not re.search(r"\b[Dd]elete\b", node.value), f"{path.name}:{node.lineno}: {node.value}"
