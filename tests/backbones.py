"""Tiny random backbones on disk, as transformers saves trained ones."""

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from mgcc_dist.common.files import write_json

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
WIDTHS = (2, 3, 4, 5, 6, 8)
MODELS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], layer_type="basic")
    ),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=32)
    ),
}


def save_backbone(folder, name="resnet", seed=0):
    """Write a classifier with its image processor; return the model."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"do_normalize": True, "image_mean": MEAN, "image_std": STD})
    return model
