"""The README's own commands and Python snippet, run as pasted, and its links."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(heading, language):
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.e2e
def test_tour_works_as_pasted(tmp_path):
    (shell,) = code_blocks("A 60-second tour", "bash")
    (snippet,) = code_blocks("A 60-second tour", "python")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("bash", "-euc", shell)
    shape, highest, iou = re.fullmatch(r"(\(.*\)) (\S+) (\S+)\n", run(sys.executable, "-c", snippet)).groups()
    assert shape == "(64, 64)"
    assert 0 < float(highest) <= 1
    assert 0 < float(iou) < 1


def test_every_link_leads_to_a_file():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_is_short():
    assert README.count("\n") < 160
