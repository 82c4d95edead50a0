"""Configs of runs that differ in seed and folder are parsed once, and read like any others."""

import pytest
import yaml

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.reporting import run_configs
from mgcc_dist.reporting.run_configs import RunConfigs
from mgcc_dist.train.saved_run import read_config

TEXT = "data:\n  shards: out/a\n  split: s\nloop:\n  epochs: 2\n  seed: {seed}\nmethod:\n  name: mgcc\nout: {out}\n"
DIFFERENT = TEXT.replace("epochs: 2", "epochs: 3")
OF_TWO_LINES = "a\n  b"
"""which the lines of seed and folder do not hold"""


def test_configs_of_one_sweep_are_parsed_and_checked_once(tmp_path, monkeypatch):
    texts = [TEXT.format(seed=1, out="a"), TEXT.format(seed=2, out="b: c # d"), TEXT.format(seed=3, out=OF_TWO_LINES)]
    texts += [DIFFERENT.format(seed=1, out="a"), "out: a\nsampling:\n  seed: 1\n", "out: b\nsampling:\n  seed: 2\n"]
    texts[1] = texts[1].replace("b: c # d", "'b: c # d'")
    configs, folders = RunConfigs(), []
    for text in texts:
        folders.append(tmp_path / str(len(folders)))
        folders[-1].mkdir()
        (folders[-1] / "config.yaml").write_text(text)
        assert configs.read(folders[-1] / "config.yaml") == yaml.safe_load(text)

    checked = []
    monkeypatch.setattr(run_configs, "read_config", lambda *words: checked.append(words) or read_config(*words))
    for folder in folders[:4]:
        assert configs.check(folder, configs.read(folder / "config.yaml")) == read_config(folder, SegmentConfig)
    assert len(checked) == 2


def test_a_damaged_config_is_named(tmp_path):
    for text in ("a: [", "5", "data: 5", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml: not"):
            RunConfigs().read(tmp_path / "config.yaml")
