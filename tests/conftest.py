import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mgcc_dist.common.log import PACKAGE
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.splits import make_split, write_split

gc.disable()  # while modules are imported, which makes little garbage

REPOSITORY = Path(__file__).parents[1]
# With `-n` a second process starts a Slurm for these, none of which has jobs of several ranks: their ports would be the
# same in both.
ON_SECOND_SLURM = tuple(f"tests/slurm/test_{name}.py" for name in ("chain", "kills", "packing"))
OF_ALL_BUSI = ("tests/data/test_splits.py", "tests/data/test_test_parts.py", "tests/test_shards.py")
"""which use `busi_shards`"""
SHARING_NOTHING = ("tests/slurm/test_local.py", "tests/kernels/test_compile.py")
LONGEST_FIRST = (
    *("tests/slurm/", "tests/kernels/", "tests/benchmarks/", "tests/test_readme.py", "tests/docs/", "tests/e2e/"),
    *("tests/methods/test_ranks.py", "tests/launch/", "tests/common/test_threads.py"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, keep tests that share a Slurm, a Triton interpreter or a module's fixtures in one process."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class FolderOrFileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            if file in ON_SECOND_SLURM:
                return "tests/slurm, second"
            if file in OF_ALL_BUSI:
                return "all of BUSI"
            shared = next((each for each in ("tests/kernels", "tests/slurm") if folder.startswith(each)), file)
            return file if file in SHARING_NOTHING else shared

    return FolderOrFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Run the longest scopes first: one that started last would leave the other processes of `-n` without work."""

    def rank(item):
        return next((i for i, folder in enumerate(LONGEST_FIRST) if item.nodeid.startswith(folder)), len(LONGEST_FIRST))

    items.sort(key=rank)


def pytest_collection_finish(session):
    gc.enable()
    gc.freeze()  # otherwise each full collection, of which pytest does five at the end, visits all that was imported
    if session.items and "ranks" in sys.modules:
        sys.modules["ranks"].start_fork_server()


@pytest.fixture(scope="session", autouse=True)
def torch_extensions(tmp_path_factory):
    """Let DeepSpeed compile in a folder of the tests: a lock left by a kill would block builds in the user's folder."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        # The processes of `-n` share one folder.
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "torch_extensions"))
        yield


@pytest.fixture(autouse=True)
def logging_restored():
    """Undo what a test does to the package's logger, for example by calling a program's `main`."""
    before = PACKAGE.handlers[:], PACKAGE.level, PACKAGE.propagate
    yield
    PACKAGE.handlers[:], PACKAGE.propagate = before[0], before[2]
    PACKAGE.setLevel(before[1])


@pytest.fixture(scope="session")
def data_root():
    """The folder of real data sets: MGCC_DATA, or ../shared/data next to the repository."""
    root = Path(os.environ.get("MGCC_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"needs real data: {root} does not exist; set MGCC_DATA to the folder of the data sets")
    return root


@pytest.fixture(scope="session")
def busi_root(data_root):
    """BUSI as published."""
    root = data_root / "Dataset_BUSI_with_GT"
    if not root.is_dir():
        pytest.skip(f"needs BUSI: {root} does not exist; set MGCC_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="session")
def busi_shards(busi_root, tmp_path_factory):
    """All of BUSI as a shard folder of 16x16 thumbnails; its groups are those of the original images."""
    return write_shards(busi(busi_root), tmp_path_factory.mktemp("busi") / "shards", size=16)


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory):
    """24 labeled phantoms of 32x32 in three shards. Don't write into the folder."""
    return write_shards(Phantoms(count=24, seed=0, size=32), tmp_path_factory.mktemp("phantom") / "shards", per_shard=8)


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """A folder with 40 phantoms of 32x32 in `shards` and a split of them in `split.json`. Don't write into it."""
    folder = tmp_path_factory.mktemp("phantom_data")
    shards = write_shards(Phantoms(count=40, seed=0, size=32), folder / "shards")
    split = make_split(shards.records, seed=0, validation=10, labeled=15, grouped=False, name="split")
    write_split(folder / "split.json", split)
    return folder


@dataclass(frozen=True)
class SmallDisk:
    folder: Path

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def make_read_only(self):
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1 MB until it is resized. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {mounted.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def vae():
    """An untrained AutoencoderKL for images of 16x16 whose weights are always the same."""
    import torch
    from tiny_ldm import AUTOENCODER

    from mgcc_dist.diffusion import autoencoder

    torch.manual_seed(0)
    vae = autoencoder.build(AUTOENCODER, 16)
    vae.register_to_config(scaling_factor=1.7)
    return vae


@pytest.fixture
def image_folder(tmp_path):
    """Six images of 40x30 with masks; two differ only in brightness."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(5):
        coarse = rng.integers(0, 200, (6, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 30)).save(tmp_path / "data" / "images" / f"{i}.png")
    brighter = np.asarray(Image.open(tmp_path / "data" / "images" / "3.png")) + np.uint8(20)
    Image.fromarray(brighter).save(tmp_path / "data" / "images" / "5.png")
    for i in range(6):
        mask = Image.new("L", (40, 30))
        mask.paste(255, (10, 10, 20 + i, 20))
        mask.save(tmp_path / "data" / "masks" / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def no_pictures(monkeypatch):
    """Let `mgcc evaluate` leave out its gallery and page, which take most of its time."""
    from mgcc_dist.reporting import evaluation

    monkeypatch.setattr(evaluation, "draw_cases", lambda cases, caption, path, columns: path.touch())
    monkeypatch.setattr(evaluation, "render_evaluation", lambda summary, rows, gallery: "")
