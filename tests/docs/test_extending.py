"""Every recipe of docs/extending.md works as written: its files and commands, outside the package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import pytest
import ranks

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
        if block.title:
            assert not (tree / block.title).exists(), f"{block.title} exists already"
            (tree / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tree / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed.append(run([sys.executable, "-c", block.text], tree))
        else:
            for line in block.text.replace("\\\n", " ").splitlines():
                printed.append(run(command(line), tree))
    return "".join(printed)


def command(line):
    """The words of a line of the page, run by this interpreter."""
    environment = [word for word in shlex.split(line) if re.fullmatch(r"[A-Z_]+=\S+", word)]
    words = shlex.split(line)[len(environment) :]
    if words[0] == "mgcc":
        words = ["python", "-m", "mgcc_dist", *words[1:]]
    assert words[0] == "python", line
    return ["env", *environment, sys.executable, *words[1:]]


def run(words, tree):
    if words[:4] == ["env", sys.executable, "-m", "mgcc_dist"]:
        return ranks.finish(ranks.forked(1, tree), words[2:])
    # Compiled kernels go into a cache of the tree, not into the user's.
    clean = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tree / "cache")}
    done = subprocess.run(words, cwd=tree, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A copy of the tree with the data that the recipes train on."""
    tree = tmp_path_factory.mktemp("recipes") / "tree"
    being_written = shutil.ignore_patterns("*.pyc.*")  # bytecode, by another process
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, tree / name, symlinks=True, ignore=being_written)
    carry_out(sections()[PHANTOMS], tree)
    return tree


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "file", "content"),
    [
        ("A method", "out/entropy/result.json", '"method": "entropy"'),
        ("A network", "out/fcn/result.json", '"name": "fcn"'),
        ("A data set", "out/clinic/index.json", '"group": "patient-1"'),
        ("A denoiser", "out/ldm/samples/index.json", '"records": 8'),
        ("An autoencoder", "out/patch/samples/index.json", '"records": 8'),
        ("An optimizer", "out/rmsprop/config.yaml", "alpha: 0.9"),
    ],
)
def test_recipe_works_as_written(recipe, file, content, phantoms, tmp_path):
    tree = copy_of(phantoms, tmp_path)
    printed = carry_out(sections()[recipe], tree)
    assert content in (tree / file).read_text(encoding="utf-8")
    if recipe == "A method":
        assert re.search(r"^entropy +Entropy minimisation on unlabeled images .* \[entropy\]$", printed, re.MULTILINE)


@pytest.mark.e2e
def test_kernel_recipe_works_as_written(phantoms, tmp_path):
    pytest.importorskip("triton")
    tree = copy_of(phantoms, tmp_path)
    printed = carry_out(sections()["A kernel"], tree)
    assert "4 passed" in printed
    assert "compile: 7 compiled, 0 problems" in printed
    assert "squared_relu 64x64x64 B8 float32 evaluation        forward  plain contiguous" in printed
    assert '"name": "squared"' in (tree / "out/squared/result.json").read_text(encoding="utf-8")


@pytest.mark.e2e
def test_an_installed_package_needs_no_import(phantoms, tmp_path):
    tree = copy_of(phantoms, tmp_path)
    carry_out([block for block in sections()["A method"] if block.title], tree)
    project, *commands = sections()["An installed package"]
    install(tomllib.loads(project.text), tree)
    assert "[entropy]" in carry_out(commands, tree)
    assert '"method": "entropy"' in (tree / "out/installed/result.json").read_text(encoding="utf-8")


def install(project, tree):
    """Write the metadata that pip would write for a package in `tree`, which is on the path."""
    name, version = project["project"]["name"], project["project"]["version"]
    metadata = tree / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"].items()
    lines = [line for group, entries in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def copy_of(tree, folder):
    return shutil.copytree(tree, folder / "tree", symlinks=True)
