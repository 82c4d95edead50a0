"""diffusers' `UNet2DModel` as a denoiser. A mask is one more input channel, a class is added to the time."""

from diffusers import UNet2DModel

from mgcc_dist.diffusion.config import UNetDenoiserConfig


def build(config: UNetDenoiserConfig, shape: tuple[int, int, int], labels: int) -> UNet2DModel:
    """Return a U-Net with random weights, for latents of `shape` [C,h,w] and `labels` class labels (0: no classes)."""
    channels, size, _ = shape
    down = ["AttnDownBlock2D" if has_attention else "DownBlock2D" for has_attention in config.attention]
    up = ["AttnUpBlock2D" if has_attention else "UpBlock2D" for has_attention in reversed(config.attention)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels + config.mask_channels,
        out_channels=channels,
        block_out_channels=config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
        attention_head_dim=config.head_channels,
        num_class_embeds=labels or None,
    )
