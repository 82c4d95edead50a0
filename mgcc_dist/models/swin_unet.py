"""Swin-UNet (Cao et al. 2022) as SSL4MIS configures it: 27.18 M parameters at the default sizes, 27.17 M at window 7.

    patches -> stage 0 -merge-> stage 1 -merge-> stage 2 -merge-> stage 3
            |                |                |                      | expand
            v                v                v                      v
    head <- stage 0 <-expand- stage 1 <-expand- stage 2 <------------+

As in the released code, a skip connection carries the input of an encoder stage, not its output; decoder stages have as
many blocks as encoder stages; and the deepest stage is not repeated. The attention is MONAI's.
"""

from collections.abc import Sequence

import torch
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformerBlock, compute_mask, get_window_size
from torch import Tensor, nn

from mgcc_dist.models.blocks import fit_input
from mgcc_dist.models.config import SWIN_PATCH
from mgcc_dist.models.network import Network


class SwinStage(nn.Module):
    """Swin blocks; every second one shifts its windows by half their side: [B,H,W,C] -> [B,H,W,C]."""

    def __init__(self, channels: int, heads: int, window: int, drop_paths: Sequence[float]) -> None:
        """Build one block per entry of `drop_paths`, its stochastic depth rate."""
        super().__init__()
        self.window = (window, window)
        self.shift = (window // 2, window // 2)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(channels, heads, self.window, self.shift if i % 2 else (0, 0), drop_path=drop_path)
            for i, drop_path in enumerate(drop_paths)
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        window, shift = get_window_size(size, self.window, self.shift)  # no shift along a side of one window
        mask = compute_mask(size, window, shift, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x


class PatchExpand(nn.Module):
    """Expand each token to scale x scale tokens: [B,H,W,in] -> [B,scale*H,scale*W,out]."""

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(in_channels, scale**2 * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        s = self.scale
        x = self.expand(x).unflatten(-1, (s, s, -1))  # [B,H,W,s,s,out]
        return self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class SwinUNet(Network):
    """Images [B,in_channels or 1,H,W] -> logits [B,1,H,W]. One-channel images are repeated to `in_channels`.

    H and W must be multiples of 4 * 2^(stages - 1) * window, so that windows tile the features of every stage.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 8,
        drop_path: float = 0.2,
    ) -> None:
        """`depths` are the blocks per stage; `drop_path` is the last block's rate, growing linearly from 0."""
        super().__init__()
        self.in_channels = in_channels
        self.window = window
        widths = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = [rates.tolist() for rates in torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)]
        stages = list(zip(widths, heads, drop_paths, strict=True))
        self.embed = nn.Conv2d(in_channels, embed_dim, SWIN_PATCH, stride=SWIN_PATCH)
        self.embed_norm = nn.LayerNorm(embed_dim)
        self.encoder = nn.ModuleList(SwinStage(width, h, window, rates) for width, h, rates in stages)
        self.merges = nn.ModuleList(PatchMergingV2(width, spatial_dims=2) for width in widths[:-1])
        self.encoder_norm = nn.LayerNorm(widths[-1])
        self.expands = nn.ModuleList(PatchExpand(2 * width, width, scale=2) for width in widths[:-1])
        self.joins = nn.ModuleList(nn.Linear(2 * width, width) for width in widths[:-1])
        self.decoder = nn.ModuleList(SwinStage(width, h, window, rates) for width, h, rates in stages[:-1])
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.final_expand = PatchExpand(embed_dim, embed_dim, scale=SWIN_PATCH)
        self.head = nn.Conv2d(embed_dim, 1, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        multiple = SWIN_PATCH * 2 ** len(self.merges) * self.window
        x = fit_input(x, multiple, self.in_channels, f"With network.window {self.window} it must be")
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))  # [B,H/4,W/4,C], channels last from here
        skips = []
        for stage, merge in zip(self.encoder[:-1], self.merges, strict=True):
            skips.append(x)
            x = merge(stage(x))
        x = self.encoder_norm(self.encoder[-1](x))
        for level in reversed(range(len(skips))):
            x = torch.cat((self.expands[level](x), skips[level]), dim=-1)
            x = self.decoder[level](self.joins[level](x))
        x = self.final_expand(self.decoder_norm(x))
        return self.head(x.permute(0, 3, 1, 2))
