"""The file formats of `mgcc export`: how each is written, what it says about itself, and its backend."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgcc_dist.common.errors import UserError, reason_of

OPSET = 18
INPUT, OUTPUTS = "images", ("mask", "probability")
DYNAMIC = {0: "batch", 1: "height", 2: "width"}
METADATA_FILE, RT_INFO = "metadata.json", "mgcc_dist"

Metadata = dict[str, str]
Outputs = tuple[np.ndarray, np.ndarray]
"""mask bool [B,H,W] and probability float32 [B,H,W]"""
Run = Callable[[np.ndarray], Outputs]
"""runs an opened file on images uint8 [B,H,W,3]"""


class Format(NamedTuple):
    suffix: str
    packages: tuple[str, ...]
    """which it needs"""
    write: Callable[[nn.Module, Tensor, Metadata, Path], None]
    """gets an `ExportGraph`, example images, what the file shall say about itself, and the path"""
    read: Callable[[Path], Metadata]
    """returns what the file says about itself; raises an exception of its library if it is not such a file"""
    open: Callable[[Path], Run]
    """opens the file in its backend on the CPU, with as many threads as PyTorch has"""
    winograd: bool = False
    """whether large convolutions are written in Winograd's form"""
    companions: tuple[str, ...] = ()
    """suffixes of the files that belong to it"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' remarks about deprecations, constants, and packages that they do not find."""
    torch_onnx = logging.getLogger("torch.onnx")
    level = torch_onnx.level
    torch_onnx.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_onnx.setLevel(level)


def write_onnx(graph: nn.Module, images: Tensor, metadata: Metadata, path: Path) -> None:
    """Write ONNX with its weights in one file.

    Raises:
        UserError: the exporter cannot translate the network.
    """
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": list(OUTPUTS), "dynamic_shapes": [DYNAMIC]}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(graph, (images,), dynamo=True, opset_version=OPSET, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--to onnx: PyTorch can't translate this network ({reason_of(error)})") from error
    assert program is not None
    program.model.metadata_props.update(metadata)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of this machine
    program.save(str(path), external_data=False)


def read_onnx(path: Path) -> Metadata:
    import onnx

    return {each.key: each.value for each in onnx.load(path).metadata_props}


def describe_onnx(path: Path, metadata: Metadata) -> None:
    """Replace what an ONNX file says about itself."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(list(OUTPUTS), {INPUT: images}))


def write_torchscript(graph: nn.Module, images: Tensor, metadata: Metadata, path: Path) -> None:
    """Write TorchScript with BN folded by `torch.jit.freeze`."""
    with _quiet(), torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(graph, images, check_trace=False))
        torch.jit.save(frozen, path, _extra_files={METADATA_FILE: json.dumps(metadata)})


def read_torchscript(path: Path) -> Metadata:
    files = {METADATA_FILE: ""}
    with _quiet():
        torch.jit.load(path, map_location="cpu", _extra_files=files)
    content: Metadata = json.loads(files[METADATA_FILE])
    return content


def open_torchscript(path: Path) -> Run:
    with _quiet():
        module = torch.jit.load(path, map_location="cpu")

    @torch.inference_mode()
    def run(images: np.ndarray) -> Outputs:
        mask, probability = module(torch.from_numpy(images))
        return mask.numpy(), probability.numpy()

    return run


def write_openvino(graph: nn.Module, images: Tensor, metadata: Metadata, path: Path) -> None:
    """Write OpenVINO's XML and, next to it, .bin with float32 weights, by way of ONNX.

    Raises:
        UserError: the exporter cannot translate the network.
    """
    import openvino

    onnx = path.with_suffix(".onnx")
    write_onnx(graph, images, {}, onnx)
    model = openvino.Core().read_model(onnx)
    model.set_rt_info(metadata, RT_INFO)
    openvino.save_model(model, path, compress_to_fp16=False)
    onnx.unlink()


def read_openvino(path: Path) -> Metadata:
    import openvino

    content: Metadata = openvino.Core().read_model(path).get_rt_info(RT_INFO).value
    return content


def open_openvino(path: Path) -> Run:
    """Open OpenVINO's XML, or ONNX."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    model = openvino.Core().compile_model(path, "CPU", hints)

    def run(images: np.ndarray) -> Outputs:
        found = model(images)
        return tuple(found[name] for name in OUTPUTS)

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, read_onnx, open_onnx, winograd=True),
    "torchscript": Format(".pt", (), write_torchscript, read_torchscript, open_torchscript),
    "openvino": Format(
        *(".xml", ("onnx", "onnxscript", "openvino"), write_openvino, read_openvino, open_openvino),
        winograd=True,
        companions=(".bin",),
    ),
}
