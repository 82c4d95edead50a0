"""A pretrained backbone as the encoder of U-Net, CMU-Net, CCT and MGCC (`network.encoder`).

    image --- blocks of the U-Net ---------------------- features of stride 1 (and 2)
       `----- normalization, backbone, laterals -------- features of stride 2 or 4, ..., 32

A backbone begins at stride 2 or 4, where outlines are already blurred. So the levels above are blocks of the U-Net on
the image, as in Swin UNETR (Hatamizadeh et al. 2022). A lateral, 1x1 convolution, BN and ReLU, brings each level of the
backbone to the network's width, so decoders, gates and perturbations see features like those of the U-Net's encoder:
as many channels, and none negative.

Backbones are folders with config.json, model.safetensors and, for the normalization, preprocessor_config.json: those of
transformers, and those of timm, whose config.json names an `architecture`. A network's weights file holds the
architecture of the backbone next to its weights, so it loads without that folder.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import read_json
from mgcc_dist.models.blocks import DoubleConv, fit_input
from mgcc_dist.models.config import EncoderDecoderConfig, NetworkConfig

CONFIG, NORMALIZATION, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""normalization of a backbone whose folder says none"""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBE = 64  # side of an image that shows a backbone's strides, and is large enough for BN and windows

logger = logging.getLogger(__name__)


class PretrainedEncoder(nn.Module):
    """Images [B,in_channels or 1,H,W] in [-1,1] -> features [B,widths[i],H/2^i,W/2^i] of every level, shallow to deep.

    Grey images are repeated to the backbone's channels. That keeps its weights and the normalization of each channel;
    summing its first convolution's weights over channels would give the same features except at the image's border.
    H and W must be multiples of 2^(levels - 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, in_channels: int, widths: Sequence[int], architecture: dict[str, Any], folder: Path | None = None
    ) -> None:
        """Build the backbone of `architecture` (see `read_architecture`), with the weights in `folder` or random ones.

        Raises:
            UserError: its channels or levels do not fit the network, or the folder does not hold all of its weights.
        """
        super().__init__()
        self.architecture = architecture
        self.in_channels = in_channels
        self.multiple = 2 ** (len(widths) - 1)
        for name in ("mean", "std"):
            values = torch.tensor(architecture[name]).float().view(1, -1, 1, 1)
            if values.shape[1] not in (1, in_channels):
                raise UserError(
                    f"network.in_channels: must be {values.shape[1]}, the channels of the encoder, not {in_channels}"
                )
            self.register_buffer(name, values, persistent=False)
        self.backbone = _create(architecture, folder)
        strides, channels = _probe(self.backbone, in_channels, f"{folder or architecture['name']}")
        levels = [2**level for level in range(len(widths))]
        if strides not in (levels[1:], levels[2:]):
            raise UserError(
                f"network.encoder: {folder or architecture['name']} has levels of strides {strides}. Choose a backbone "
                "whose levels each halve the image, from stride 2 or 4 to stride 32."
            )
        above = len(levels) - len(strides)
        before = (in_channels, *widths)
        self.shallow = nn.ModuleList(DoubleConv(before[level], widths[level]) for level in range(above))
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(deep, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for deep, width in zip(channels, widths[above:], strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = fit_input(x, self.multiple, self.in_channels)
        features: list[Tensor] = []
        for block in self.shallow:
            features.append(block(F.max_pool2d(features[-1], 2) if features else x))
        deeper = self.backbone(((x + 1) / 2 - self.mean) / self.std)
        return features + [lateral(level) for lateral, level in zip(self.laterals, deeper, strict=True)]


def pretrained_encoder(
    in_channels: int, widths: Sequence[int], encoder: str | None, encoder_config: str | None
) -> PretrainedEncoder:
    """Build the encoder of a network's config: as a weights file describes it, or with the weights that it names.

    Raises:
        UserError: there is no such backbone, or it does not fit the network.
    """
    if encoder_config:
        return PretrainedEncoder(in_channels, widths, json.loads(encoder_config))
    assert encoder is not None
    folder = locate_backbone(encoder)
    return PretrainedEncoder(in_channels, widths, read_architecture(folder), folder)


def with_architecture(config: NetworkConfig, module: nn.Module) -> NetworkConfig:
    """Return `config` with the architecture of the pretrained encoder in `module`, as weights files hold it."""
    encoder = next((each for each in module.modules() if isinstance(each, PretrainedEncoder)), None)
    if encoder is None or not isinstance(config, EncoderDecoderConfig):
        return config
    return replace(config, encoder_config=json.dumps(encoder.architecture))


def locate_backbone(encoder: str) -> Path:
    """Return the folder of a backbone; a name on the Hugging Face hub is downloaded, unless it was before.

    Raises:
        UserError: there is no such folder, or the download fails.
    """
    folder = Path(encoder)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(encoder):
        raise UserError(f"network.encoder: {encoder} does not exist. Name a folder, or OWNER/NAME on the hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(encoder, allow_patterns=[CONFIG, NORMALIZATION, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"network.encoder: {encoder} is not a folder, and can't be downloaded from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the network, or download it elsewhere and name its folder."
        ) from error


def backbone_weights(config: NetworkConfig) -> list[Path]:
    """Return the weights file of the backbone that `network.encoder` names; none if it is not on this machine."""
    encoder = config.encoder if isinstance(config, EncoderDecoderConfig) else None
    if encoder is None:
        return []
    file = Path(encoder) / WEIGHTS
    if not file.is_file() and _HUB_NAME.fullmatch(encoder):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(encoder, WEIGHTS)
        file = Path(cached) if isinstance(cached, str) else file
    return [file] if file.is_file() else []


def read_architecture(folder: Path) -> dict[str, Any]:
    """Read what rebuilds a backbone and normalizes its images: library, name, config, mean, std.

    Raises:
        UserError: the folder holds no backbone.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"network.encoder: {folder} has no {name}. Save the backbone with save_pretrained().")
    config = read_json(folder / CONFIG)
    if "architecture" in config:
        pretrained = config.get("pretrained_cfg", {})
        found = {"image_mean": pretrained.get("mean"), "image_std": pretrained.get("std")}
        architecture = {"library": "timm", "name": config["architecture"], "config": config.get("model_args") or {}}
    else:
        found = read_json(folder / NORMALIZATION) if (folder / NORMALIZATION).is_file() else {}
        architecture = {"library": "transformers", **_transformers_config(folder)}
    if found.get("do_normalize") is False:
        return architecture | {"mean": [0.0], "std": [1.0]}
    if not found.get("image_mean") or not found.get("image_std"):
        logger.info("network.encoder: %s does not say how to normalize images; using ImageNet's constants", folder)
        return architecture | IMAGENET
    return architecture | {"mean": list(found["image_mean"]), "std": list(found["image_std"])}


def _transformers_config(folder: Path) -> dict[str, Any]:
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"network.encoder: {folder} is not a model of transformers ({reason_of(error)})") from error
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise UserError(
            f"network.encoder: transformers has no backbone for {config.model_type}, the model in {folder}. Choose "
            "another, such as a ResNet, ConvNeXt or Swin."
        )
    config.out_features = [name for name in config.stage_names if name != "stem"]
    return {"name": config.model_type, "config": json.loads(config.to_json_string(use_diff=False))}


def _create(architecture: dict[str, Any], folder: Path | None) -> nn.Module:
    """Build a backbone, images -> list of features; with the weights in `folder`, or random ones."""
    if architecture["library"] == "timm":
        try:
            import timm
        except ModuleNotFoundError as error:
            raise UserError("network.encoder: it is a model of timm. Run `pip install timm`.") from error
        name = f"local-dir:{folder}" if folder else architecture["name"]
        return timm.create_model(name, pretrained=folder is not None, features_only=True, **architecture["config"])
    return _Stages(_transformers_backbone(architecture, folder))


def _transformers_backbone(architecture: dict[str, Any], folder: Path | None) -> nn.Module:
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig

    config = AutoConfig.for_model(**architecture["config"])
    if folder is None:
        return AutoBackbone.from_config(config)
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone asks the hub for local folders too
    with _quiet_transformers():
        backbone, report = backbone_class.from_pretrained(
            folder, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    # A classifier has no norms of the outputs of its stages.
    missing = [name for name in report["missing_keys"] if not name.startswith("hidden_states_norms.")]
    if missing:
        raise UserError(
            f"network.encoder: {folder / WEIGHTS} lacks {len(missing)} weights of a {architecture['name']} backbone, "
            f"the first is {missing[0]}. Name the folder of the complete model."
        )
    return backbone


class _Stages(nn.Module):
    """A backbone of transformers that returns the features of its stages as a list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.model(x).feature_maps)


def _probe(backbone: nn.Module, channels: int, name: str) -> tuple[list[int], list[int]]:
    """Return the strides and channels of the backbone's levels, and remove modules without an effect on them.

    DDP waits for the gradients of all parameters, and a Swin has a norm after its last stage that a backbone ignores.
    """
    backbone.eval()
    try:
        with torch.enable_grad():
            features = backbone(torch.zeros(1, channels, _PROBE, _PROBE))
            torch.stack([level.sum() for level in features]).sum().backward()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"network.encoder: {name} fails on images of {_PROBE}x{_PROBE} with network.in_channels {channels} "
            f"({reason_of(error)})"
        ) from error
    for path, module in list(backbone.named_modules()):
        own = list(module.parameters(recurse=False))
        if own and all(parameter.grad is None for parameter in own):
            backbone.set_submodule(path, nn.Identity())
    backbone.zero_grad(set_to_none=True)
    backbone.train()
    return [_PROBE // level.shape[-1] for level in features], [level.shape[1] for level in features]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the list of unused weights and a progress bar of a second from the log; missing weights are an error."""
    from transformers.utils import logging as settings

    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
