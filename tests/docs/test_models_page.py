"""The commands of docs/how-to/models.md have options that exist, and its script works as written."""

import re
import shlex
from importlib import import_module

import pytest
from PIL import Image
from predict_runs import noise

from mgcc_dist import cli
from mgcc_dist.common.command_line import read_command_line
from mgcc_dist.common.config import build, settings_of
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "how-to" / "models.md").read_text(encoding="utf-8")
COMMANDS = [match[0].strip("`") for match in re.finditer(r"^mgcc .*|`mgcc [a-z]+ -[^`]+`", PAGE, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_page_is_understood(command):
    _, program, *words = shlex.split(command.removesuffix(" ..."))
    default = import_module(cli.PROGRAMS[program][0]).PROGRAM.default
    line = read_command_line(default.config, words, default.presets, default.default_preset)
    build(default.config, settings_of(default.config, line.layers))


def test_the_script_of_the_page_works_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(40, 30)).save("image.png")
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(script, "models.md", "exec"), names)
    assert names["mask"].shape == names["probability"].shape == (30, 40)
