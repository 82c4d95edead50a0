"""Every recipe of docs/extending.md works as written: its files, changes and commands, in a copy of the tree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "extending.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("mgcc_dist", "kernels", "launch", "configs", "slurm")
PHANTOMS = "Something to train on"


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    """the file that it creates or changes; empty for what is run"""
    text: str


def sections():
    """The code blocks of the page by heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {title: [Block(*block) for block in BLOCK.findall(text)] for title, text in pairs}


def carry_out(blocks, tree):
    """Do in `tree` what the blocks of a recipe say; what the commands printed."""
    printed = []
    for block in blocks:
        if block.title and block.language == "diff":
            change(tree / block.title, block.text)
        elif block.title:
            assert not (tree / block.title).exists(), f"{block.title} exists already"
            (tree / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tree / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed.append(run([sys.executable, "-c", block.text], tree))
        else:
            for line in block.text.replace("\\\n", " ").splitlines():
                printed.append(run(command(line), tree))
    return "".join(printed)


def change(file, diff):
    """Apply hunks without line numbers: each must match the file in exactly one place."""
    text = file.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        before = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        after = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
        assert text.count(before) == 1, f"{file.name} has {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    file.write_text(text, encoding="utf-8")


def command(line):
    """The words of a line of the page, run by this interpreter."""
    environment = [word for word in shlex.split(line) if re.fullmatch(r"[A-Z_]+=\S+", word)]
    words = shlex.split(line)[len(environment) :]
    if words[0] == "mgcc":
        words = ["python", "-m", f"mgcc_dist.{words[1]}", *words[2:]]
    assert words[0] == "python", line
    return ["env", *environment, sys.executable, *words[1:]]


def run(words, tree):
    # Compiled kernels go into a cache of the tree, not into the user's.
    clean = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tree / "cache")}
    done = subprocess.run(words, cwd=tree, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A copy of the tree with the data that the recipes train on."""
    tree = tmp_path_factory.mktemp("recipes") / "tree"
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    carry_out(sections()[PHANTOMS], tree)
    return tree


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "file", "content"),
    [
        ("A method", "out/entropy/result.json", '"method": "entropy"'),
        ("A network", "out/fcn/result.json", '"name": "fcn"'),
        ("A data set", "out/clinic/index.json", '"group": "patient-1"'),
        ("A denoiser", "out/ldm/pipeline/unet/config.json", '"_class_name": "ConvDenoiser"'),
        ("A kernel", "kernels/ledger/triton-*.json", '"squared_relu bf16"'),
    ],
)
def test_recipe_works_as_written(recipe, file, content, phantoms, tmp_path):
    if recipe == "A kernel":
        pytest.importorskip("triton")
    tree = tmp_path / "tree"
    shutil.copytree(phantoms, tree, symlinks=True)
    carry_out(sections()[recipe], tree)
    assert any(content in path.read_text(encoding="utf-8") for path in tree.glob(file))


def test_page_counts_the_files_of_each_recipe():
    rows = dict(re.findall(r"^\| \[([a-z ]+)\]\(#[a-z-]+\) \| (\d+):", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    files = {
        title.removeprefix("A "): len({block.title for block in blocks} - {""}) for title, blocks in sections().items()
    }
    assert {name: int(number) for name, number in rows.items()} == {name: files[name] for name in rows}
