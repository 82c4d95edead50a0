"""Provenance of a result: the source compared with its commit, versions, the Slurm job."""

import json
import subprocess

import pytest
import torch

from mgcc_dist.common.environment import Source, describe_environment, source


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def tree(tmp_path):
    """A checkout with one commit."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.py").write_text("a = 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_a_clean_tree_is_identified_by_its_commit(tree):
    assert source(tree) == Source(git(tree, "rev-parse", "--short=12", "HEAD").strip())


def test_a_changed_tree_has_a_plus_and_a_diff_that_reproduces_it(tree):
    head = git(tree, "rev-parse", "--short=12", "HEAD").strip()
    (tree / "a.py").write_text("a = 2\n")
    (tree / "weights.bin").write_bytes(bytes(range(256)))
    git(tree, "add", "weights.bin")
    (tree / "new file.py").write_text("")
    found = source(tree)
    assert found.commit == f"{head}+"
    assert found.untracked == ("new file.py",)
    assert found.summary == "2 files changed, 1 insertion(+), 1 deletion(-)"
    git(tree, "reset", "--quiet", "--hard")
    subprocess.run(["git", "-C", tree, "apply", "-"], input=found.diff, check=True)
    assert (tree / "a.py").read_text() == "a = 2\n"
    assert (tree / "weights.bin").read_bytes() == bytes(range(256))


def test_an_untracked_file_counts_as_a_change(tree):
    (tree / "new.py").write_text("")
    assert source(tree).commit.endswith("+")


def test_a_package_outside_a_checkout_or_inside_another_one_has_no_commit(tree, tmp_path):
    (tree / "site-packages").mkdir()
    assert source(tmp_path) == source(tree / "site-packages") == Source()


def test_environment_is_json_and_names_the_slurm_job(monkeypatch):
    assert describe_environment(torch.device("cpu"))["slurm"] is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    found = describe_environment(torch.device("cpu"))
    assert found["slurm"] == {"job": "12", "array_task": "3"}
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found))["cores"] >= 1
