"""A model of one MGCC training step: bytes, operations and predicted milliseconds of every operation, by GPU.

    python -m benchmarks.roofline_step                            # the table of settings
    python -m benchmarks.roofline_step --parts                    # operations of the convolutions by part
    python -m benchmarks.roofline_step --ops 20 --gpu H100        # the longest operations of each setting
    python -m benchmarks.roofline_step --out roofline.json --measured benchmarks/results

The step is traced on fake tensors (no GPU, no memory), in bfloat16, with the paper's network, batch and size. Each ATen
operation takes the larger of its bytes at the GPU's memory rate and its floating-point operations at the rate of its
tensor cores, and at least the shortest time of a kernel. Modules with a fused implementation take the phases of their
`OperationSpec` instead. Rates are the vendors' peaks times the shares below, which are assumptions; a measured number
replaces none of them. With `--measured`, times of benchmarks.train_step on the same GPU are listed next to the
predictions.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgcc_dist.common.files import write_json
from mgcc_dist.common.gpus import PEAKS
from mgcc_dist.kernels import bias_free
from mgcc_dist.kernels.operation import Workload, find_operation, specs
from mgcc_dist.methods.losses import consistency_loss, supervised_loss
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network

MIXED = "channels_last bf16 fused_sgd"
IMAGES, SIZE = 8, 256  # 4 labeled and 4 unlabeled
OPTIMIZER_PASSES = 5  # SGD with momentum: reads parameter, gradient and momentum, writes parameter and momentum
FREE = {"view", "t", "transpose", "permute", "expand", "slice", "split", "detach", "unsqueeze", "squeeze", "select"}
FREE |= {"as_strided", "alias", "_unsafe_view", "reshape", "empty", "empty_like", "new_empty", "split_with_sizes"}
FREE |= {"device", "is_same_size", "dim"}
"""operations that launch no kernel"""


@dataclass(frozen=True)
class GPU:
    """Dense bfloat16 peak and memory rate of the data sheet."""

    teraflops: float
    terabytes: float


MEMORY_RATES = {"A100": 2.04, "H100": 3.35, "H200": 4.8, "B200": 8.0}
GPUS = {name: GPU(PEAKS[name].fp16, terabytes) for name, terabytes in MEMORY_RATES.items()}
LIBRARY_SHARE = 0.5
"""of the peak, that cuDNN and cuBLAS reach in this network's convolutions"""
KERNEL_SHARE = 0.4
"""of the peak, that the Triton kernels reach"""
MEMORY_SHARE = 0.76
"""of the memory rate, that elementwise kernels reach (2.55 of 3.35 TB/s on an H100)"""
SHORTEST_KERNEL = 2e-6
"""seconds"""
COMPILED_PASSES = 0.5
"""share of the elementwise and norm passes that torch.compile leaves"""


@dataclass(frozen=True)
class Setting:
    """A row of benchmarks.train_step that can be predicted."""

    name: str
    fused: tuple[str, ...] = ()
    """operations that run as their spec says"""
    compiled: bool = False
    added_biases: bool = False
    """also before batch norm"""


SETTINGS = (
    Setting(f"{MIXED} added_biases", added_biases=True),
    Setting(MIXED),
    Setting(f"{MIXED} phase_upconv", ("upconv",)),
    Setting(f"{MIXED} fused_kernels", ("upconv", "msag", "mixer")),
    Setting(f"{MIXED} compile added_biases", compiled=True, added_biases=True),
    Setting(f"{MIXED} compile", compiled=True),
    Setting(f"{MIXED} compile phase_upconv", ("upconv",), compiled=True),
    Setting(f"{MIXED} compile fused_kernels", ("upconv", "msag", "mixer"), compiled=True),
)


@dataclass(frozen=True)
class Cost:
    """One operation of ATen, or one phase of an `OperationSpec`."""

    operation: str
    flops: float
    bytes: float
    triton: bool = False

    def seconds(self, gpu: GPU, compiled: bool) -> float:
        peak = gpu.teraflops * 1e12 * (KERNEL_SHARE if self.triton else LIBRARY_SHARE)
        passes = COMPILED_PASSES if compiled and not self.flops else 1.0
        moved = passes * self.bytes / (gpu.terabytes * 1e12 * MEMORY_SHARE)
        return max(self.flops / peak, moved, SHORTEST_KERNEL * passes)


class Recorder(TorchDispatchMode):
    """Counts the ATen operations that run inside, by their cost on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: Counter[Cost] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name not in FREE and not name.startswith("sym_"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            moved = float(sum({id(tensor): tensor.nbytes for tensor in tensors}.values()))
            for cost in costs_of_call(name, args, result, moved):
                self.costs[cost] += 1
        return result


def costs_of_call(name: str, args: Any, result: Any, moved: float) -> list[Cost]:
    """Return the cost of a call that reads and writes its tensors, `moved` bytes, once; more than one if it has more.

    Convolutions add their bias, and sum its gradient, in kernels of their own. A norm reads its inputs twice.
    """
    if name == "convolution":
        bias = [Cost("bias of a convolution", 0.0, 2.0 * result.nbytes)] if args[2] is not None else []
        return [Cost(name, 2.0 * result.numel() * args[1][0].numel(), moved), *bias]
    if name == "convolution_backward":
        gradient, weight, mask = args[0], args[2], args[10]
        bias = [Cost("bias of a convolution, backward", 0.0, float(gradient.nbytes))] if mask[2] else []
        return [Cost(name, 2.0 * gradient.numel() * weight[0].numel() * (mask[0] + mask[1]), moved), *bias]
    if name == "native_batch_norm":
        return [Cost(name, 0.0, moved + args[0].nbytes)]
    if name == "native_batch_norm_backward":
        return [Cost(name, 0.0, moved + args[0].nbytes + args[1].nbytes)]
    return [Cost(name, 0.0, moved)]


@dataclass(frozen=True)
class Part:
    """A fusible module of the network, or all of the step outside of these."""

    operation: str
    """name of its `OperationSpec`; "" for the rest of the step"""
    shape: tuple[int, ...]
    """of a `Workload`"""
    costs: list[Cost]


Traces = dict[bool, list[Part]]
"""the parts of a step, with and without `Setting.added_biases`"""


def trace(
    images: int = IMAGES, size: int = SIZE, config: MGCCConfig | None = None, added_biases: bool = False
) -> list[Part]:
    """Return the costs of one step by part, as PyTorch runs it; those of a fusible module are traced on their own."""
    devices = () if added_biases else ("cpu",)  # on which the tensors are that stand for a GPU's
    with FakeTensorMode(), mock.patch.object(bias_free, "DEVICES", devices):
        network = build_network(config or MGCCConfig()).train()
        modules = {name: module for name, module in network.named_modules() if find_operation(module)[0]}
        outer = {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}
        shapes: dict[str, tuple[int, ...]] = {}

        def remember(name: str) -> Any:
            def hook(module: Any, inputs: Any) -> None:
                shapes.setdefault(name, tuple(inputs[0].shape[1:]))

            return hook

        for name in outer:
            # The first layer stands for a stack, whose `outputs` are called instead of its forward.
            first = next((each for other, each in modules.items() if other.startswith(f"{name}.")), modules[name])
            first.register_forward_pre_hook(remember(name))
        with Recorder() as whole:
            with torch.autocast("cpu", torch.bfloat16):
                main, auxiliary = network(torch.empty(images, 1, size, size))
            half, masks = images // 2, torch.empty(images // 2, 1, size, size)
            supervised: Any = sum(supervised_loss(y[:half].float(), masks) for y in (main, *auxiliary))
            unlabeled = [y[half:].float() for y in auxiliary]
            (supervised + consistency_loss(main[half:].float(), unlabeled, False)).backward()
        parts, rest = [], whole.costs
        for name in sorted(outer):
            spec, _ = find_operation(modules[name])
            assert spec is not None
            x = torch.empty(images, *shapes[name], dtype=torch.bfloat16, requires_grad=True)
            with Recorder() as own:
                with torch.autocast("cpu", torch.bfloat16):
                    y = modules[name](x)
                y.backward(torch.empty_like(y))
            rest = rest - own.costs
            shape = (*shapes[name], *spec.sizes(modules[name]))
            parts.append(Part(spec.name, shape, list(own.costs.elements())))
        parameters = sum(parameter.numel() for parameter in network.parameters())
    optimizer = Cost("optimizer", 0.0, 4.0 * OPTIMIZER_PASSES * parameters)
    return [*parts, Part("", (), [*rest.elements(), optimizer])]


def costs_of(part: Part, setting: Setting, images: int = IMAGES) -> list[Cost]:
    """Return the costs of a part under a setting: those of PyTorch, or the phases of its kernels."""
    if part.operation not in setting.fused:
        return part.costs
    workload = Workload(part.operation, part.shape, images, torch.bfloat16, training=True)
    if specs()[part.operation].implementations().get("torch"):  # training runs it in PyTorch: the norm's passes stay
        kept = [replace(cost, flops=cost.flops * 16 / 36) for cost in part.costs if "upsample" not in cost.operation]
        output = 4 * workload.pixels * part.shape[3] * workload.dtype.itemsize
        return [*kept, *(Cost("interleave", 0.0, 2.0 * output) for _ in ("forward", "backward"))]
    phases = [phase for each in ("forward", "backward") for phase in workload.roofline_phases(each)]
    return [Cost(part.operation, flops, moved, triton=True) for flops, moved in phases]


def predict(parts: Traces, setting: Setting, gpu: GPU) -> tuple[float, dict[str, dict[str, float]]]:
    """Return the milliseconds of a step, and by operation its milliseconds, TFLOP, GB and calls; the longest first."""
    rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts[setting.added_biases]:
        for cost in costs_of(part, setting):
            row = rows[f"{part.operation or 'rest'}: {cost.operation}"]
            row["ms"] += 1e3 * cost.seconds(gpu, setting.compiled and not cost.triton)
            row["tflop"] += cost.flops / 1e12
            row["gigabytes"] += cost.bytes / 1e9
            row["calls"] += 1
    ordered = sorted(rows.items(), key=lambda item: -item[1]["ms"])
    rounded = {name: {key: round(value, 4) for key, value in row.items()} for name, row in ordered}
    return sum(row["ms"] for row in rows.values()), rounded


def measured_steps(folder: Path | None) -> dict[tuple[str, str], float]:
    """Return measured milliseconds by GPU and setting, from results of benchmarks.train_step at the paper's size."""
    found = {}
    for path in sorted(folder.glob("*.json")) if folder else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        name = next((name for name in GPUS if name in str(content.get("device"))), None)
        case = content.get("case", {})
        if name and (case.get("size"), case.get("batch")) == (SIZE, IMAGES // 2):
            for setting, row in content["rows"].items():
                if "steps_per_second" in row:
                    found[name, setting] = 1e3 / row["steps_per_second"]
    return found


def table(parts: Traces, measured: dict[tuple[str, str], float]) -> Iterator[str]:
    """Yield the lines of a Markdown table: milliseconds per step, predicted and, where it exists, measured."""
    yield f"| setting | {' | '.join(GPUS)} |"
    yield f"| --- |{' ---: |' * len(GPUS)}"
    for setting in SETTINGS:
        cells = []
        for name, gpu in GPUS.items():
            found = measured.get((name, setting.name))
            cells.append(f"{predict(parts, setting, gpu)[0]:.1f}" + (f" (measured {found:.1f})" if found else ""))
        yield f"| `{setting.name}` | {' | '.join(cells)} |"


def part_of(name: str) -> str:
    """Return the part of MGCC that a convolution belongs to."""
    parts = {"encoder": "encoder", "mixer": "nine ConvMixer layers"}
    in_decoder = {"gates": "four decoders: gates", "ups": "four decoders: up-convolutions"}
    names = name.split(".")
    found = [in_decoder[each] for each in names if each in in_decoder]
    return parts.get(names[0]) or (found[0] if found else "four decoders: other convolutions")


def convolutions() -> list[str]:
    """Return a table of a forward pass: operations and outputs of all convolutions by part of the network."""
    flops: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    with torch.device("meta"):
        network = build_network(MGCCConfig()).train()
        images = torch.empty(IMAGES, 1, SIZE, SIZE)

    def count(part: str, layer: torch.nn.Conv2d, _: Any, output: Tensor) -> None:
        flops[part] += 2 * output.numel() * layer.weight[0].numel()
        outputs[part] += output.numel()

    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(partial(count, part_of(name)))
    network(images)
    lines = ["| part | TFLOP | share | convolution outputs in bfloat16 |", "| --- | ---: | ---: | ---: |"]
    for part, flop in [*flops.items(), ("**all**", flops.total())]:
        size = outputs[part] or outputs.total()
        lines.append(f"| {part} | {flop / 1e12:.3f} | {flop / flops.total():.1%} | {2 * size / 1e9:.2f} GB |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", type=int, default=0, metavar="N", help="also print the N longest operations per setting"
    )
    parser.add_argument("--parts", action="store_true", help="only print the operations of the convolutions by part")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="of --ops (default: H100)")
    parser.add_argument("--measured", type=Path, metavar="FOLDER", help="folder with results of benchmarks.train_step")
    parser.add_argument("--out", type=Path, help="JSON file to write: every operation of every setting and GPU")
    options = parser.parse_args()
    if options.parts:
        print("\n".join(convolutions()))
        return
    parts, measured = {added: trace(added_biases=added) for added in (True, False)}, measured_steps(options.measured)
    print("\n".join(table(parts, measured)))
    print("milliseconds per step, predicted" + ("" if measured else "; none has been measured"))
    for setting in SETTINGS if options.ops else ():
        print(f"\n{setting.name}, {options.gpu}")
        for name, row in list(predict(parts, setting, GPUS[options.gpu])[1].items())[: options.ops]:
            numbers = (
                f"{row['ms']:8.2f} ms {row['tflop']:7.3f} TFLOP {row['gigabytes']:7.2f} GB {row['calls']:6g} calls"
            )
            print(f"{name:48} {numbers}")
    if options.out:
        rows: dict[str, Any] = {}
        for setting in SETTINGS:
            for name, gpu in GPUS.items():
                ms, operations = predict(parts, setting, gpu)
                found = {"predicted_ms": round(ms, 2), "operations": operations}
                if (name, setting.name) in measured:
                    found["measured_ms"] = round(measured[name, setting.name], 2)
                rows[f"{setting.name}, {name}"] = found
        write_json(options.out, {"rows": rows})
        print(f"roofline_step: {options.out}")


if __name__ == "__main__":
    main()
