"""The recipes in containers/ agree with each other, with setup.py and with constraints.txt."""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
RECIPES = ("Dockerfile", "mgcc.def")


def arguments(name):
    """Return the build arguments of a recipe with their defaults."""
    text = (ROOT / "containers" / name).read_text()
    return dict(re.findall(r"^(?:ARG |    )(BASE|TORCH_INDEX|EXTRAS)=(.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_python_and_extras_of_setup_py(name):
    setup = (ROOT / "setup.py").read_text()
    found = arguments(name)
    assert found == arguments(RECIPES[0])
    assert found["TORCH_INDEX"] == "default"
    (version,) = re.findall(r"^python:([\d.]+)-", found["BASE"])
    (required,) = re.findall(r'python_requires="(.*)"', setup)
    assert SpecifierSet(required).contains(version)
    extras = re.findall(r'^        "([\w]+)": ', setup.partition("extras_require")[2], re.MULTILINE)
    assert "slurm" in extras
    assert set(found["EXTRAS"].split(",")) <= set(extras) - {"dev", "docs"}


def test_both_recipes_copy_what_the_package_is_built_from():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    definition = (ROOT / "containers" / "mgcc.def").read_text()
    copied = re.findall(r"^    (\S+) /opt/mgcc-dist/(\S+)$", definition, re.MULTILINE)
    assert all(source == target for source, target in copied)
    assert {source for source, _ in copied} == allowed
    linked = {path.name for path in (ROOT / "mgcc_dist").iterdir() if path.is_symlink()}
    files = {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert allowed == {"mgcc_dist", *linked, "containers", *files}
    assert "*" in ignored


@pytest.mark.parametrize("name", RECIPES)
def test_every_package_comes_from_constraints(name):
    text = (ROOT / "containers" / name).read_text()
    assert "pip install" not in text
    assert "containers/install.sh" in text
    installs = [
        line for line in (ROOT / "containers" / "install.sh").read_text().splitlines() if line.startswith("pip ")
    ]
    assert installs
    assert all("constraints.txt" in line for line in installs)
