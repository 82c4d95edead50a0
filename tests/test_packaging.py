"""A wheel built from the tree and installed elsewhere is whole: programs, configs, splits, what the links point at."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "launch", "configs", "slurm")


@pytest.mark.parametrize("name", LINKED)
def test_part_is_linked_into_the_package_by_a_relative_link(name):
    link = ROOT / "mgcc_dist" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.is_dir()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git tracks, in a copy, so that nothing left by other builds slips in."""
    if not (ROOT / ".git").exists():
        pytest.skip("the tree is not a git checkout, so what belongs to it is not known")
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-cf", folder / "tree.tar", "--null", "-T", "-"], cwd=ROOT, input=tracked, check=True)
    (folder / "tree").mkdir()
    subprocess.run(["tar", "-xf", folder / "tree.tar", "-C", folder / "tree"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "tree"], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_every_tracked_file_of_the_package(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    parts = ["mgcc_dist", "kernels", "launch", "configs"]
    tracked = subprocess.run(["git", "ls-files", *parts], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(line) for line in tracked.splitlines()]
    inside = {str(path if path.parts[0] == "mgcc_dist" else "mgcc_dist" / path) for path in files}
    inside -= {f"mgcc_dist/{name}" for name in LINKED}  # the links themselves
    assert inside - there == set()
    assert "mgcc_dist/configs/splits/busi_random_1.json" in there


def test_installed_wheel_runs_from_elsewhere(wheel, tmp_path):
    """In a new environment that sees this one's packages, but not this tree."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    # Appended after the new environment's own packages: what both have comes from the wheel.
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run([python, *words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import mgcc_dist, mgcc_dist.kernels; print(mgcc_dist.__file__)"
    assert run("-c", where).strip() == str(site / "mgcc_dist" / "__init__.py")
    assert "--autoencoder.loop.learning_rate" in run("-m", "mgcc_dist.ldm", "--help")
    assert "learning_rate: 1.0e-06" in run("-m", "mgcc_dist.ldm", "--preset", "busi", "--print_config")
