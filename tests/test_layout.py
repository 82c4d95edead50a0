"""Imports run one way through the package's layers."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder imports from folders further left, and from its own.
LAYERS = [
    {"kernels"},
    {"common"},
    {"data", "models"},
    {"train", "evaluation", "bench"},
    {"methods", "diffusion"},
    {"inference", "sweep"},
    {"assessment", "reporting", "segmentation", "serving"},
]
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
PROGRAMS = {path.stem for path in (ROOT / "mgcc_dist").glob("*.py")} - {"__init__", "__main__"}
MODULES = sorted(
    path.relative_to(ROOT / "mgcc_dist")
    for path in (ROOT / "mgcc_dist").rglob("*.py")
    if path.relative_to(ROOT / "mgcc_dist").parts[0] not in ("slurm", "configs", "launch")
)


def imported(path):
    """First component below mgcc_dist of each import in the file, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "mgcc_dist":
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else (name.name for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("mgcc_dist."))


def test_every_folder_has_a_layer():
    folders = {module.parts[0] for module in MODULES if len(module.parts) > 1}
    assert folders | {"kernels"} == set(LEVEL)


@pytest.mark.parametrize("module", [module for module in MODULES if len(module.parts) > 1], ids=str)
def test_folders_do_not_import_upward(module):
    folder = module.parts[0]
    for name in imported(ROOT / "mgcc_dist" / module):
        assert name not in PROGRAMS, f"{module} imports the program {name}"
        if name != folder and name in LEVEL:
            assert LEVEL[name] < LEVEL[folder], f"{module} imports {name}, which is not below {folder}"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.stem in PROGRAMS and len(module.parts) == 1], ids=str
)
def test_programs_do_not_import_programs(module):
    if module.stem != "cli":
        assert not PROGRAMS & set(imported(ROOT / "mgcc_dist" / module)) - {"__init__"}


def test_monai_is_imported_at_the_top_of_the_one_module_that_needs_it():
    """It takes seconds to import, so the module is imported only to build its network."""
    pattern = re.compile(r"^(import|from) (monai|mgcc_dist\.models\.swin_unet)\b", re.MULTILINE)
    texts = {str(module): (ROOT / "mgcc_dist" / module).read_text(encoding="utf-8") for module in MODULES}
    found = {module for module, text in texts.items() if pattern.search(text)}
    assert found == {"models/swin_unet.py"}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their names alone: of two files of one name only one would be collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
