"""Sections whose keys depend on a component: which keys they take, what is dropped, what is refused."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from mgcc_dist.common import components
from mgcc_dist.common.command_line import parse
from mgcc_dist.common.components import Registry, import_plugin, take_imports
from mgcc_dist.common.config import Layer, as_plain, as_yaml, load, resolve, save
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.value_types import PositiveInt, UnitInterval


@dataclass(frozen=True)
class OvenConfig:
    name: str
    """what heats"""
    degrees: PositiveInt = 200
    """temperature"""


@dataclass(frozen=True)
class GasConfig(OvenConfig):
    """A gas oven."""

    name: Literal["gas"] = "gas"
    flame: UnitInterval = 0.5
    """size of the flame"""


@dataclass(frozen=True)
class TrayConfig:
    width: PositiveInt = 30
    """width in cm"""


@dataclass(frozen=True)
class ElectricConfig(OvenConfig):
    """An electric oven."""

    name: Literal["electric"] = "electric"
    fan: bool = False
    """whether the fan runs"""
    tray: TrayConfig = field(default_factory=TrayConfig)
    """tray"""


OVENS = Registry("oven", OvenConfig, default="gas")
OVENS.register(GasConfig, "tests.common.test_components:Gas")
OVENS.register(ElectricConfig, dict)


@dataclass(frozen=True)
class BakeConfig:
    oven: OvenConfig = field(default_factory=GasConfig)
    """oven"""
    minutes: PositiveInt = 10
    """how long"""


@pytest.fixture(autouse=True)
def forget_imports(monkeypatch):
    monkeypatch.setattr(components, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


def bake(*trees):
    return resolve(BakeConfig, [Layer(tree, f"layer {i}") for i, tree in enumerate(trees)])


def error_of(*trees):
    with pytest.raises(UserError) as caught:
        bake(*trees)
    return str(caught.value)


def test_the_name_chooses_the_keys():
    assert bake() == BakeConfig()
    assert bake({"oven": {"name": "electric", "fan": True}}).oven == ElectricConfig(fan=True)
    assert bake({"oven": "electric"}, {"oven.tray.width": 20}).oven == ElectricConfig(tray=TrayConfig(20))
    assert parse(BakeConfig, ["--oven", "electric", "--oven.fan", "true"]).oven == ElectricConfig(fan=True)
    assert parse(BakeConfig, ["--oven.fan=true", "--oven={name: electric, degrees: 9}"]).oven.degrees == 9
    assert as_plain(BakeConfig())["oven"] == {"name": "gas", "degrees": 200, "flame": 0.5}


def test_keys_of_the_earlier_component_are_dropped_and_common_ones_kept():
    preset = {"oven": {"name": "gas", "flame": 1, "degrees": 150}, "minutes": 5}
    assert bake(preset, {"oven": {"name": "electric"}}) == BakeConfig(ElectricConfig(degrees=150), 5)
    assert bake({"oven": {"fan": True, "flame": 1}}, {"oven": {"name": "gas"}}).oven == GasConfig(flame=1)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([{"oven": {"fan": True}}], "layer 0: oven.fan: oven gas has no such key. Its keys: name, degrees, flame."),
        (
            [{"oven": {"name": "gas", "fan": True}}],
            "layer 0: oven.fan: oven gas has no such key. Its keys: name, degrees, flame.",
        ),
        (
            [{"oven": "electric"}, {"oven": {"flame": 1}}],
            "layer 1: oven.flame: oven electric has no such key. Its keys: name, degrees, fan, tray.width.",
        ),
        (
            [{"oven": {"preheating": 1}}, {"oven": "electric"}],
            "layer 0: oven.preheating: unknown key. Its keys: name, degrees, fan",
        ),
        ([{"oven": {"degree": 1}}], "layer 0: oven.degree: unknown key. Did you mean oven.degrees?"),
        ([{"oven": "gaz"}], "layer 0: oven.name: expected one of gas, electric, got 'gaz'. Did you mean gas?"),
        ([{"oven": {"degrees": "hot"}}], "layer 0: oven.degrees: expected a positive integer, got 'hot'"),
        ([{}, {"minuts": 3}], "layer 1: minuts: unknown key. Did you mean minutes?"),
        ([{"oven": 3}], "layer 0: oven: expected a mapping of keys, got 3"),
    ],
)
def test_a_wrong_key_names_its_source(trees, message):
    assert error_of(*trees).startswith(message)


def test_a_name_is_registered_once():
    with pytest.raises(UserError, match=f"oven 'gas' is already registered by {__name__}"):
        OVENS.register(GasConfig, dict)


def test_an_unknown_name_is_looked_up_in_installed_plugins_first(tmp_path, monkeypatch):
    (tmp_path / "steam_oven.py").write_text(
        "from dataclasses import dataclass\n"
        f"from {__name__} import OVENS, OvenConfig\n\n"
        "@dataclass(frozen=True)\n"
        "class SteamConfig(OvenConfig):\n"
        "    '''A steam oven.\n\n    With water.'''\n\n"
        "    name: str = 'steam'\n"
        "OVENS.register(SteamConfig, list)\n"
    )
    metadata = tmp_path / "steam_oven-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: steam-oven\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mgcc_dist.plugins]\nsteam = steam_oven\n")
    monkeypatch.syspath_prepend(tmp_path)
    components.load_installed_plugins.cache_clear()
    try:
        assert bake({"minutes": 3}).oven.name == "gas"
        assert "steam_oven" not in sys.modules
        assert bake({"oven": "steam"}).oven.name == "steam"
        component = OVENS.get("steam")
        assert (component.summary, component.plugin, component.load()) == ("A steam oven.", "steam_oven", list)
    finally:
        OVENS._components.pop("steam", None)
        sys.modules.pop("steam_oven", None)
        components.load_installed_plugins.cache_clear()


def test_a_plugin_that_fails_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken_plugin.py"
    path.write_text("import math\n\nimport no_such_module\n")
    with pytest.raises(UserError) as caught:
        take_imports(["--out", "x", f"--import={path}"])
    assert str(caught.value) == (
        f"--import {path}: cannot be imported at {path}:3 (ModuleNotFoundError: No module named 'no_such_module')"
    )
    assert "broken_plugin" not in sys.modules
    with pytest.raises(UserError, match=r"--import no_such_module: cannot be imported \(ModuleNotFoundError"):
        import_plugin("no_such_module")


def test_a_saved_config_imports_the_file_of_its_component(tmp_path, monkeypatch):
    path = tmp_path / "pizza_oven.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        f"from {__name__} import OVENS, OvenConfig\n\n"
        "@dataclass(frozen=True)\n"
        "class PizzaConfig(OvenConfig):\n"
        "    name: str = 'pizza'\n\n"
        "OVENS.register(PizzaConfig, list)\n"
    )
    try:
        import_plugin(str(path))
        save(bake({"oven": {"name": "pizza", "degrees": 450}}), tmp_path / "config.yaml")
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["import"] == [str(path)]
        sys.modules.pop("pizza_oven")
        OVENS._components.pop("pizza")
        assert load(BakeConfig, tmp_path / "config.yaml").oven.degrees == 450
        assert "import" not in as_yaml(bake())
    finally:
        OVENS._components.pop("pizza", None)
        sys.modules.pop("pizza_oven", None)


def test_files_and_modules_are_imported_wherever_they_stand_on_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "first_plugin.py").write_text("loaded = True\n")
    (tmp_path / "files" / "second_plugin.py").write_text("from plugin_helper import loaded\n")
    (tmp_path / "files" / "plugin_helper.py").write_text("loaded = True\n")
    words = ["--import", "first_plugin", "run", "--import", "files/second_plugin.py", "--out", "x"]
    assert take_imports(words) == ["run", "--out", "x"]
    assert take_imports(words) == ["run", "--out", "x"]  # once more is no error
    for name in ("first_plugin", "second_plugin", "plugin_helper"):
        assert sys.modules.pop(name).loaded
