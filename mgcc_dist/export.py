"""Export a trained network as ONNX, TorchScript, OpenVINO, MONAI bundle or model folder. Research use only.

    mgcc export --run out/runs/mgcc_1 --to onnx --out mgcc.onnx
    mgcc export --run out/runs/mgcc_1 --to safetensors --out models/mgcc_1

onnx, torchscript and openvino write a file that needs neither this package nor, but for torchscript, PyTorch. It takes
images and returns masks; everything between is inside:

    images        uint8 [B,H,W,3], RGB (repeat grey images three times), any batch and size
    mask          bool [B,H,W], at the images' size
    probability   float32 [B,H,W], not calibrated; the mask is where it is above 0.5

Images become grey, are resized as in training (`data.fit`) and scaled, and the probability is resized back, as in
`mgcc predict --precision no`. BN is folded into convolutions, and large convolutions are in Winograd's form (onnx,
openvino). The file is run by its own backend and compared with PyTorch before it gets its name. It says which run and
weights it is of. `mgcc predict --backend FILE` runs it, too.

--int8 SHARDS writes ONNX with 8-bit convolutions: up to four times as fast as PyTorch on CPUs with VNNI, in a quarter
of the size. The loss of IoU on validation images is measured and reported; above --max-iou-loss nothing is written.

onnx needs the extra `export`, openvino also `openvino`; OpenVINO also reads the ONNX file. See docs/how-to/export.md.

safetensors writes a model folder, a few MB with a model card: for `--model` of predict, evaluate and export, and for
`mgcc push`. monai writes a bundle around the TorchScript file. See docs/how-to/models.md.
"""

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.inference.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Export the network.

    Raises:
        UserError: see the formats; or an option is for another format.
    """
    if config.int8 and config.to != "onnx":
        raise UserError("--int8: is for --to onnx, which OpenVINO reads, too. Leave out --to or --int8.")
    if config.split and not config.int8:
        raise UserError("--split: names the validation images of --int8. Pass --int8 SHARDS, too.")
    if config.to == "safetensors":
        from mgcc_dist.inference.model_folder import export_model
        from mgcc_dist.reporting.model_card import model_card

        export_model(config, model_card)
    elif config.to == "monai":
        from mgcc_dist.inference.monai_bundle import export_bundle

        export_bundle(config)
    else:
        from mgcc_dist.inference.export import export

        export(config)


PROGRAM = Program(
    "export", __doc__, Command(ExportConfig, run, "export a run as ONNX, OpenVINO, MONAI bundle, ...", __doc__)
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("export", main)
