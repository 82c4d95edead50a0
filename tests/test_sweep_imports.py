"""Plugins of a sweep: what reading it imports, and what the commands of its steps import."""

import sys

import pytest
import yaml

from mgcc_dist.common import components
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.sweep.expansion import read_sweep

READER = """
from mgcc_dist.data.readers.registry import READERS

@READERS.register_function
def clinic_of_ours(root):
    'A clinic.'
"""


def sweep_of(folder, plugin, **dataset):
    content = {
        "title": "plugins",
        "out": str(folder / "out"),
        "preset": "mgcc_busi",
        "seeds": [1],
        "import": str(plugin),
    }
    dataset = {"data": {"split": "busi_random_1"}, **dataset}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | {"datasets": {"Clinic": dataset}, "rows": {"MGCC": {}}}))
    return read_sweep(path)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file to import, which is forgotten afterwards."""
    monkeypatch.setattr(components, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "sweep_plugin.py"
    sys.modules.pop("sweep_plugin", None)
    READERS._components.pop("clinic_of_ours", None)


def test_reading_a_sweep_imports_its_plugins(tmp_path, plugin):
    plugin.write_text("imported = True")
    sweep_of(tmp_path, plugin)
    assert sys.modules.pop("sweep_plugin").imported
    plugin.write_text("1 / 0")
    with pytest.raises(UserError, match=r"sweep\.yaml: import: .*sweep_plugin\.py.*ZeroDivisionError"):
        sweep_of(tmp_path, plugin)


def test_the_commands_of_steps_import_the_plugins_that_they_use(tmp_path, plugin):
    """The task of a step is another process, which does not read the sweep."""
    plugin.write_text(READER)
    prepare = {
        "shards": {"run": "shards clinic_of_ours --root r --out o", "makes": "o/index.json"},
        "split": {"run": "shards split --root o --out s.json", "makes": "s.json"},
    }
    step, split = sweep_of(tmp_path, plugin, prepare=prepare).steps
    assert split.command() == ["-m", "mgcc_dist.shards", "split", "--root", "o", "--out", "s.json"]
    started = ["-m", "mgcc_dist.shards", f"--import={plugin}", "clinic_of_ours"]
    assert step.command() == [*started, "--root", "r", "--out", "o"]
    assert step.program.command(["--config", "x"]) == [*started, "--config", "x"]
