"""Export a trained network as ONNX, TorchScript or OpenVINO, to use it without this package. Research use only.

    mgcc export --run out/runs/mgcc_1 --to onnx --out mgcc.onnx

The file takes images and returns masks; everything between is inside:

    images        uint8 [B,H,W,3], RGB (repeat grey images three times), any batch and size
    mask          bool [B,H,W], at the images' size
    probability   float32 [B,H,W], not calibrated; the mask is where it is above 0.5

Images become grey, are resized as in training (`data.fit`) and scaled, and the probability is resized back, as in
`mgcc predict --precision no`. BN is folded into convolutions, and up-convolutions are in their phase form. The file is
run by its own backend and compared with PyTorch before it gets its name. It says which run and weights it is of.

onnx needs the extra `export`, openvino also `openvino`; OpenVINO also reads the ONNX file. See docs/how-to/export.md.
"""

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.inference.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Export the network."""
    from mgcc_dist.inference.export import export

    export(config)


PROGRAM = Program(
    "export", __doc__, Command(ExportConfig, run, "export a run as ONNX, TorchScript or OpenVINO", __doc__)
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("export", main)
