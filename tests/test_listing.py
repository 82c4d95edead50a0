"""`mgcc list`: everything that can be chosen by name, with one line each."""

from typing import get_args

import pytest

from mgcc_dist import listing
from mgcc_dist.common.components import load_installed_plugins
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError


def listed(capsys, *words):
    listing.main(words)
    return [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", get_args(listing.Kind))
def test_everything_has_a_name_and_a_line(capsys, kind):
    lines = listed(capsys, kind)
    assert all(len(line) == 2 and len(line[1]) > 10 for line in lines)
    assert len(lines) >= 1


def test_shipped_names_are_listed(capsys):
    assert [name for name, _ in listed(capsys, "networks")] == ["unet", "cmunet", "mgcc", "cct", "swin_unet"]
    assert {"busi", "folder"} <= {name for name, _ in listed(capsys, "datasets")}
    assert {path.stem for path in (CONFIGS / "sweeps").glob("*.yaml")} == {n for n, _ in listed(capsys, "sweeps")}


def test_a_broken_installed_plugin_is_named(tmp_path, monkeypatch):
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mgcc_dist.plugins]\nbroken = no_such_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_installed_plugins.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^plugin broken \(no_such_plugin\): cannot be imported \(ModuleNotFound"):
            listing.main(["networks"])
    finally:
        load_installed_plugins.cache_clear()
