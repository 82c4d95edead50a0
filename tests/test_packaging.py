"""A wheel built from the tree and installed elsewhere is whole: programs, configs, splits, what the links point at."""

import ast
import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mgcc_dist.train.initial_weights import shipped_models

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "launch", "configs", "slurm")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def files_of_the_tree(*folders):
    """What git tracks or would track, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("the tree is not a git checkout, so what belongs to it is not known")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree's own files, so that nothing left by other builds slips in."""
    folder = tmp_path_factory.mktemp("tree")
    for file in files_of_the_tree():
        copy = folder / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_symlink():
            copy.symlink_to((ROOT / file).readlink())
        else:
            copy.write_bytes((ROOT / file).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    subprocess.run(build, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def requirements(wheel):
    """What the wheel asks for: [Requirement], those of extras with a marker."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return [Requirement(line) for line in email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")]


@pytest.mark.parametrize("name", LINKED)
def test_part_is_linked_into_the_package_by_a_relative_link(name):
    link = ROOT / "mgcc_dist" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert files_of_the_tree(name), f"{name}/ has no file: in a new clone the link points nowhere"


def test_wheel_carries_every_file_of_the_package(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    files = files_of_the_tree("mgcc_dist", *LINKED)
    inside = {str(path if path.parts[0] == "mgcc_dist" else "mgcc_dist" / path) for path in files}
    inside -= {f"mgcc_dist/{name}" for name in LINKED}  # the links themselves
    assert inside - there == set()
    assert "mgcc_dist/configs/splits/busi_random_1.json" in there


def test_wheel_and_sdist_carry_the_shipped_models(wheel, tree, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, stdout=subprocess.DEVNULL, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    for model in shipped_models():
        for name in ("model.safetensors", "model.json", "calibration.json", "README.md"):
            assert f"mgcc_dist/zoo/{model}/{name}" in in_sdist & in_wheel


def test_installed_wheel_runs_from_elsewhere(wheel, tmp_path):
    """In a new environment that sees this one's packages, but not this tree."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*/site-packages"))
    subprocess.run([*PIP, "install", "--no-index", "--no-deps", "--target", site, wheel], check=True)
    # Appended after the new environment's own packages: what both have comes from the wheel.
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("\n".join(outer) + "\n")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words):
        done = subprocess.run([python, *words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import mgcc_dist; print(mgcc_dist.__file__)").strip() == str(site / "mgcc_dist" / "__init__.py")
    assert "--autoencoder.loop.learning_rate" in run("-m", "mgcc_dist.ldm", "--help-all")
    assert run(site / "bin" / "mgcc", "--version").startswith("mgcc-dist ")
    assert run("-m", "mgcc_dist.listing", "models").split()[0] == "busi-small"
    assert "epochs: 300" in run("-m", "mgcc_dist.segment", "--preset", "mgcc_busi", "--print_config")
    assert "--out=out/sweeps/table_1/" in run("-m", "mgcc_dist.sweeps", "table_1")
    code = "from mgcc_dist.accelerate_launch import *; print(*launch_command(['8gpu_zero3', 'ldm']))"
    assert str(site / "mgcc_dist" / "launch" / "deepspeed" / "zero3.json") in run("-c", code)


def test_every_import_is_a_declared_dependency(requirements):
    always = {canonicalize_name(each.name) for each in requirements if not each.marker}
    by_extra = {
        part: {canonicalize_name(r.name) for r in requirements if r.marker and r.marker.evaluate({"extra": part})}
        for part in (
            "kernels",
            "slurm",
            "deepspeed",
            "readers",
            "search",
            "augment",
            "encoders",
            "clinic",
            "openvino",
            "serve",
        )
    }
    extra_of_file = {
        "mgcc_dist/bench/timing.py": "kernels",  # imported only on a GPU
        "mgcc_dist/train/weights.py": "deepspeed",  # imported only where DeepSpeed already runs
        "mgcc_dist/train/zero_resharding.py": "deepspeed",  # the same
        "mgcc_dist/data/effects.py": "augment",
        "mgcc_dist/data/readers/ddti.py": "readers",
        "mgcc_dist/data/readers/lists.py": "readers",
        "mgcc_dist/sweep/worker.py": "search",
        "mgcc_dist/models/pretrained.py": "encoders",
        "mgcc_dist/data/dicom.py": "clinic",
        "mgcc_dist/inference/dicom_seg.py": "clinic",
        "mgcc_dist/inference/nifti.py": "clinic",
        "mgcc_dist/inference/export_formats.py": "openvino",
        "mgcc_dist/inference/int8.py": "openvino",
        "mgcc_dist/serving/app.py": "serve",
        "mgcc_dist/serving/security.py": "serve",
        "mgcc_dist/serving/server.py": "serve",
    }
    always |= {"timm"}  # used where it is installed; its torchvision has no build for every torch
    distributions = packages_distributions()
    undeclared = []
    for file in files_of_the_tree("mgcc_dist", "kernels", "slurm"):
        if file.suffix != ".py":
            continue
        extra = extra_of_file.get(file.as_posix(), file.parts[0])
        allowed = always | by_extra.get(extra, set())
        for module in imported(ROOT / file) - sys.stdlib_module_names - {"mgcc_dist"}:
            if not {canonicalize_name(name) for name in distributions.get(module, [module])} & allowed:
                undeclared.append(f"{file}: {module}")
    assert undeclared == []


def imported(file):
    """Top-level names of the modules that a Python file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_dependency_is_pinned_within_its_range(requirements):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for each in requirements:
        version = pins.get(canonicalize_name(each.name))
        assert version, f"{each.name} is not in constraints.txt"
        assert each.specifier.contains(version), f"{each} but constraints.txt has {version}"
