"""Operations are folders with a spec, plain modules are recognised by type, and the kernels stand alone."""

import ast
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mgcc_dist import kernels
from mgcc_dist.bench.measure import Effort, measure, table_rows
from mgcc_dist.bench.table import write_table
from mgcc_dist.bench.variants import plain_and_fused
from mgcc_dist.bench.workloads import workloads
from mgcc_dist.kernels import aot, measured, operation
from mgcc_dist.kernels.dispatcher import KernelDispatcher, fuse
from mgcc_dist.kernels.operation import find_operation, fusible, register, specs
from mgcc_dist.models.blocks import MSAG, ConvMixer, ConvMixerLayer, UpConv

FOLDER = Path(kernels.__file__).parent
CPU = torch.device("cpu")
TOY = """
    from ..compile_spec import CompileSpec
    from ..operation import Implementation, OperationSpec, Workload, fusible, register
    from torch import nn

    @fusible("toy")
    class Toy(nn.Module):
        def __init__(self, channels):
            super().__init__()

        def forward(self, x):
            return x + x

    class FusedToy(nn.Module):
        def forward(self, x):
            return 2 * x

    class ToySpec(OperationSpec):
        name = "toy"

        def implementations(self):
            return {"torch": Implementation(lambda plain: FusedToy(), lambda plain, x: None, triton=False)}

        def workloads(self, device_type, dtype, training, quick):
            return [Workload(self.name, (4, 3, 3), 2, dtype, training)]

        def roofline_phases(self, workload, direction):
            return [(0.0, 2.0 * workload.input_bytes)]

        def compile_specs(self, target):
            return [CompileSpec("toy bf16", None, {}, {}, {})]

    register(ToySpec())
"""


@pytest.fixture
def registry(monkeypatch):
    """Forget at the end of the test which operations and types it registers."""
    specs()
    monkeypatch.setattr(operation, "_SPECS", dict(operation._SPECS))
    monkeypatch.setattr(operation, "PLAIN_TYPES", dict(operation.PLAIN_TYPES))


def test_a_fourth_operation_is_one_folder(registry, monkeypatch, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "spec.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    operation._import_folders.cache_clear()
    try:
        assert set(specs()) == {"convmixer", "mixer", "msag", "upconv", "toy"}
        toy = sys.modules["mgcc_dist.kernels.toy.spec"]
        assert fuse(toy.Toy(4), "torch").select(torch.ones(1, 4, 3, 3)) == "torch"
        (workload,) = [
            each for each in workloads("cpu", [torch.float32], quick=True) if (each.op, each.training) == ("toy", False)
        ]
        measurement = measure(workload, plain_and_fused(workload, CPU, triton=False)[0], CPU, Effort(2, 1))
        write_table(tmp_path / "table.json", table_rows(measurement), measured.CPU, {})
        rows = measured.read_table(tmp_path / "table.json")[measured.CPU]
        assert {(key[0], key[1], key[-1]) for key in rows} == {("toy", "torch", (4, 3, 3))}
        assert "toy bf16" in aot.all_specs.__wrapped__("sm_90")
    finally:
        operation._import_folders.cache_clear()
        for name in [name for name in sys.modules if name.startswith("mgcc_dist.kernels.toy")]:
            del sys.modules[name]


def test_a_second_operation_of_a_name_is_rejected(registry):
    with pytest.raises(ValueError, match="operation 'msag' is already registered"):
        register(type("Other", (operation.OperationSpec,), {"name": "msag"})())


class Inheriting(UpConv):
    """Adds a method only."""

    def describe(self):
        return "a subclass"


class Overriding(UpConv):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_subclass_is_fused_unless_it_overrides_forward():
    x = torch.randn(1, 2, 3, 3)
    fused = fuse(nn.Sequential(Inheriting(2, 2)), "torch")
    assert isinstance(fused[0], KernelDispatcher)
    model = Overriding(2, 2).eval()
    expected = model(x)
    with pytest.warns(
        UserWarning, match="upconv: Overriding is not fused, because Overriding overrides forward of UpConv"
    ):
        fused = fuse(nn.Sequential(model), "torch")
    torch.testing.assert_close(fused(x), expected)


def test_another_class_of_equal_name_and_parts_is_not_fused():
    class MSAG(nn.Module):
        pass

    assert find_operation(MSAG()) == (None, None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda stack: stack[0].__delattr__("pointwise_norm"), "of its layer 0: it has no submodule pointwise_norm"),
        (lambda stack: stack.__setitem__(1, nn.Identity()), "its layer 1 is Identity"),
        (lambda stack: setattr(stack[0], "depthwise", nn.Sequential()), "its depthwise is Sequential, not Conv2d"),
    ],
)
def test_a_plain_module_with_other_parts_is_not_fused(change, problem):
    stack = ConvMixer(2, 3, 2)
    change(stack)
    spec, found = find_operation(stack)
    assert (spec.name, problem in found) == ("mixer", True)


def test_layers_of_a_stack_that_is_not_fused_are_fused_one_by_one(registry):
    @fusible("mixer")
    class Stack(nn.Sequential):
        def outputs(self, x):
            return [x]

    model = Stack(ConvMixerLayer(2, 3), nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, "torch")
    assert [getattr(child, "operation", None) for child in fused] == ["convmixer", None]


def test_a_parametrized_convolution_is_not_fused():
    gate = MSAG(16)
    nn.utils.parametrizations.weight_norm(gate.vote)
    _, problem = find_operation(gate)
    assert problem == "its vote is ParametrizedConv2d, not Conv2d"


def imports(path):
    """Yield the top-level name of each absolute import in a file, and "" for each relative one with its level."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0] if not node.level else "", node.level


def test_kernels_import_only_torch_triton_and_each_other():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in FOLDER.rglob("*.py"):
        depth = len(path.relative_to(FOLDER).parts)
        for name, level in imports(path):
            assert (0 < level <= depth) if name == "" else name in allowed, f"{path}: {name or level}"


def test_packages_around_the_kernels_import_only_the_standard_library():
    """`import mgcc_dist.kernels` runs these files too; imports inside functions and of types do not run."""
    package = FOLDER.parent / "mgcc_dist" if FOLDER.parent.name != "mgcc_dist" else FOLDER.parent
    around = ("__init__.py", "common/__init__.py", "common/threads.py", "common/launcher.py")
    for path in (package / name for name in around):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                known = module.partition(".")[0] in sys.stdlib_module_names
                own = f"{module}.{node.names[0].name}".startswith(
                    ("mgcc_dist.common.threads", "mgcc_dist.common.launcher.")
                )
                assert known or own, f"{path}: {module}"
