"""Write a trained network as a MONAI bundle: TorchScript with everything from image to probability, and its configs.

    configs/metadata.json     what the network is, and its inputs and outputs
    configs/inference.json    a folder of PNG files in, a folder of masks out
    models/model.ts           TorchScript
    docs/README.md            how to run it

Needs MONAI with fire and pytorch-ignite to run, not this package.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mgcc_dist
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import InvalidJson, link, read_object, scratch_folder, write_json, write_text
from mgcc_dist.inference.config import ExportConfig
from mgcc_dist.inference.export import TOLERANCE, example_images, metadata_of
from mgcc_dist.inference.export_formats import write_torchscript
from mgcc_dist.inference.export_graph import ExportGraph
from mgcc_dist.inference.loading import load_network, run_info
from mgcc_dist.inference.predictor import THRESHOLD
from mgcc_dist.train.initial_weights import find_weights

logger = logging.getLogger(__name__)
METADATA, INFERENCE, NETWORK, PAGE = (
    "configs/metadata.json",
    "configs/inference.json",
    "models/model.ts",
    "docs/README.md",
)
VERSION = "0.1.0"
"""of the bundle"""
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


class BundleGraph(nn.Module):
    """Images float32 [B,3,H,W], RGB in [0,255], to lesion probability float32 [B,1,H,W], of any B, H and W."""

    def __init__(self, graph: ExportGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        _, probability = self.graph(images.round().clamp(0, 255).permute(0, 2, 3, 1))
        return probability[:, None]


def export_bundle(config: ExportConfig) -> None:
    """Write the network of a run as a MONAI bundle.

    Raises:
        UserError: no such run; the folder exists and is not the same bundle; or TorchScript computes something else.
    """
    weights = find_weights(config.run, config.weights)
    network, image_size = load_network(weights)
    info = run_info(weights)
    metadata = _metadata(info, metadata_of(config, info))
    if config.overwrite:
        _check_replaceable(config.out)
    elif config.out.exists():
        if not _is_same(config.out, metadata):
            raise UserError(f"--out {config.out}: exists and is not this export. Choose another, or use --overwrite.")
        logger.info("export: %s is up to date", config.out)
        return

    graph = BundleGraph(ExportGraph(network, image_size, info["fit"])).eval().requires_grad_(False)
    with scratch_folder(config.out) as draft:
        (draft / NETWORK).parent.mkdir()
        write_torchscript(graph, _channels_first(2, image_size + 3, image_size + 5), {}, draft / NETWORK)
        difference = _compare(graph, draft / NETWORK, _channels_first(1, image_size + 9, max(image_size - 7, 1)))
        write_json(draft / INFERENCE, INFERENCE_CONFIG)
        write_text(draft / PAGE, _page(info))
        write_json(draft / METADATA, metadata)
        for name in (NETWORK, INFERENCE, PAGE, METADATA):  # it is complete with its metadata
            link(draft / name, config.out / name)
    logger.info(
        "export: %s -> %s (largest difference of a probability from PyTorch: %.1e)", weights, config.out, difference
    )


def _is_same(folder: Path, metadata: dict[str, Any]) -> bool:
    try:
        return read_object(folder / METADATA) == metadata and all((folder / name).is_file() for name in (NETWORK, PAGE))
    except (UserError, InvalidJson, NotADirectoryError):
        return False


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` exists, is not empty and is not a bundle of this package."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    try:
        known = read_object(folder / METADATA) if folder.exists() else {"mgcc_dist": {}}
    except (UserError, InvalidJson, NotADirectoryError, FileNotFoundError):
        known = {}
    if "mgcc_dist" not in known:
        raise UserError(f"--out {folder}: exists and is not a MONAI bundle of mgcc-dist. Choose another --out.")


def _channels_first(*shape: int) -> Tensor:
    return torch.from_numpy(example_images(*shape)).permute(0, 3, 1, 2).float()


def _compare(graph: nn.Module, path: Path, images: Tensor) -> float:
    """Return the largest difference of a probability between the saved file and PyTorch.

    Raises:
        UserError: it is above TOLERANCE.
    """
    with torch.no_grad():
        difference = float((torch.jit.load(path, map_location="cpu")(images) - graph(images)).abs().max())
    if not difference <= TOLERANCE or np.isnan(difference):
        raise UserError(f"--to monai: TorchScript's probabilities differ by {difference:.2g} from PyTorch's. Use onnx.")
    return difference


def _metadata(info: dict[str, Any], origin: dict[str, str]) -> dict[str, Any]:
    """Return the content of metadata.json, in MONAI's schema."""
    from importlib.metadata import version

    any_size = ["*", "*"]
    image = {"num_channels": 3, "spatial_shape": any_size, "dtype": "float32", "is_patch_data": False}
    image |= {"type": "image", "format": "RGB", "value_range": [0, 255]}
    image["channel_def"] = {"0": "red", "1": "green", "2": "blue"}
    probability = {"num_channels": 1, "spatial_shape": any_size, "dtype": "float32", "is_patch_data": False}
    probability |= {"type": "image", "format": "segmentation", "value_range": [0, 1], "channel_def": {"0": "lesion"}}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"exported by mgcc-dist {mgcc_dist.__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"fire": "0.7", "pytorch-ignite": "0.4.11", "pillow": version("pillow")},
        "task": "Lesion segmentation in ultrasound images",
        "description": f"{info['network']['name']} trained by mgcc-dist. Research use only. Not a medical device.",
        "authors": "mgcc-dist contributors",
        "copyright": "see the data sets and the licence of mgcc-dist (Apache-2.0)",
        "data_source": str(info.get("dataset")),
        "data_type": "png",
        "image_classes": "one channel, the lesion",
        "label_classes": "one channel, the lesion",
        "pred_classes": "one channel, the probability of lesion",
        "intended_use": "Research use only. Not a medical device.",
        "mgcc_dist": origin,
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": probability}},
    }


def _page(info: dict[str, Any]) -> str:
    return (
        f"# {info['network']['name']} for lesions in ultrasound images\n\n"
        "Research use only. Not a medical device.\n\n"
        "Put PNG files into `images/`, then:\n\n"
        "```bash\npip install 'monai[fire,ignite]'\n"
        "python -m monai.bundle run --bundle_root . --meta_file configs/metadata.json "
        "--config_file configs/inference.json\n```\n\n"
        "Masks are written to `masks/`. `models/model.ts` takes images float32 `[B,3,H,W]` in [0,255] of any size, and "
        "returns the probability of lesion, float32 `[B,1,H,W]`.\n"
    )


INFERENCE_CONFIG: dict[str, Any] = {
    "imports": ["$import glob", "$import torch"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/images'",
    "output_dir": "$@bundle_root + '/masks'",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "datalist": "$sorted(glob.glob(@dataset_dir + '/*.png'))",
    "network_def": {"_target_": "torch.jit.load", "f": "$@bundle_root + '/models/model.ts'", "map_location": "@device"},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {
                "_target_": "LoadImaged",
                "keys": "image",
                "reader": "PILReader",
                "converter": "$lambda image: image.convert('RGB')",
            },
            {"_target_": "EnsureChannelFirstd", "keys": "image", "channel_dim": -1},
            # MONAI's readers and writers have x before y.
            {"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]},
            {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        ],
    },
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': file} for file in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
    "inferer": {"_target_": "SimpleInferer"},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": THRESHOLD},
            {"_target_": "Transposed", "keys": "pred", "indices": [0, 2, 1]},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_ext": ".png",
                "output_postfix": "mask",
                "output_dtype": "$__import__('numpy').uint8",
                "scale": 255,
                "resample": False,
                "separate_folder": False,
            },
        ],
    },
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network_def",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
    },
    "run": ["$@evaluator.run()"],
}
