"""Swin-UNet against a reimplementation without windows: full attention under an exact mask."""

import pytest
import torch
from monai.networks.layers import DropPath
from monai.networks.nets import swin_unetr
from torch.nn.functional import gelu, layer_norm

from mgcc_dist.common.errors import UserError
from mgcc_dist.models.config import SwinUNetConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.models.swin_unet import PatchExpand, SwinUNet

TINY = SwinUNetConfig(embed_dim=4, depths=(2, 3), heads=(2, 4), window=2)  # images are multiples of 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


class Reference:
    """TINY in evaluation mode from its weights `w`, on [H,W,C] features of one image."""

    def __init__(self, w, window):
        self.w, self.window = w, window

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x):
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def attention(self, name, x, heads, shifted):
        """Each position attends the positions of its (shifted) window that did not come round the border."""
        (height, width, channels), side = x.shape, self.window
        places = []
        for length in (height, width):
            shift = side // 2 if shifted and length > side else 0
            places.append([((i - shift) % length, i < shift) for i in range(length)])
        positions = [(i, j) for i in places[0] for j in places[1]]
        q, k, v = self.linear(f"{name}.qkv", x.reshape(-1, channels)).view(-1, 3, heads, channels // heads).unbind(1)
        scores = torch.einsum("qhc,khc->hqk", q, k) / (channels // heads) ** 0.5
        bias = torch.full_like(scores, -torch.inf)
        for a, ((ai, ai_wrapped), (aj, aj_wrapped)) in enumerate(positions):
            for b, ((bi, bi_wrapped), (bj, bj_wrapped)) in enumerate(positions):
                near = (ai // side, aj // side) == (bi // side, bj // side)
                if near and (ai_wrapped, aj_wrapped) == (bi_wrapped, bj_wrapped):
                    row = (ai - bi + side - 1) * (2 * side - 1) + aj - bj + side - 1
                    bias[:, a, b] = self.w[f"{name}.relative_position_bias_table"][row]
        mixed = torch.einsum("hqk,khc->qhc", (scores + bias).softmax(-1), v)
        return self.linear(f"{name}.proj", mixed.reshape(x.shape))

    def stage(self, name, x, depth, heads):
        for i in range(depth):
            block = f"{name}.blocks.{i}"
            x = x + self.attention(f"{block}.attn", self.norm(f"{block}.norm1", x), heads, shifted=i % 2 == 1)
            hidden = gelu(self.linear(f"{block}.mlp.linear1", self.norm(f"{block}.norm2", x)))
            x = x + self.linear(f"{block}.mlp.linear2", hidden)
        return x

    def merge(self, name, x):
        quarters = [x[row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", torch.cat(quarters, -1)))

    def expand(self, name, x, scale):
        spread = self.linear(f"{name}.expand", x)
        channels = spread.shape[-1] // scale**2
        y = x.new_zeros(x.shape[0] * scale, x.shape[1] * scale, channels)
        for part in range(scale**2):
            y[part // scale :: scale, part % scale :: scale] = spread[..., part * channels : (part + 1) * channels]
        return self.norm(f"{name}.norm", y)

    def __call__(self, image):
        """One grey image [H,W] -> logits [H,W]."""
        patches = image.unfold(0, 4, 4).unfold(1, 4, 4)
        x = torch.einsum("hwij,cij->hwc", patches, self.w["embed.weight"].sum(1)) + self.w["embed.bias"]
        skip = self.norm("embed_norm", x)
        x = self.merge("merges.0", self.stage("encoder.0", skip, 2, 2))
        x = self.norm("encoder_norm", self.stage("encoder.1", x, 3, 4))
        x = torch.cat([self.expand("expands.0", x, 2), skip], -1)
        x = self.stage("decoder.0", self.linear("joins.0", x), 2, 2)
        x = self.expand("final_expand", self.norm("decoder_norm", x), 4)
        return x @ self.w["head.weight"][0, :, 0, 0]


@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=["square", "a side of one window at the deepest stage"])
def test_network_equals_masked_full_attention_in_float64(size):
    network = build_network(TINY).double().eval()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    images = torch.randn(2, 1, *size, dtype=torch.float64)
    reference = Reference(dict(network.named_parameters()), TINY.window)
    with torch.no_grad():
        expected = torch.stack([reference(image)[None] for image in images[:, 0]])
        torch.testing.assert_close(network(images), expected)


def parameters_by_formula(window):
    """Parameter count of the original network with one class, stage by stage."""
    number = 0
    for stage in range(4):
        c, heads = 96 * 2**stage, 3 * 2**stage
        block = 12 * c**2 + 13 * c + heads * (2 * window - 1) ** 2
        if stage == 3:
            number += 2 * block
        else:
            merge, expand, join = 8 * c**2 + 8 * c, 8 * c**2 + 2 * c, 2 * c**2 + c
            number += 2 * 2 * block + merge + expand + join
    c = 96
    return number + (48 * c + c + 2 * c) + 2 * 8 * c + 2 * c + (16 * c**2 + 2 * c) + c


@pytest.mark.parametrize(("window", "millions"), [(7, 27.17), (8, 27.18)])
def test_it_has_the_parameter_count_of_the_original(window, millions):
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in SwinUNet(window=window).named_parameters()}
    assert sum(sizes.values()) == parameters_by_formula(window)
    assert round(sum(sizes.values()) / 1e6, 2) == millions
    # The benchmarks of CMU-Net's authors say 27.14 M, cut after two digits and without the tables of position biases.
    without_tables = sum(size for name, size in sizes.items() if "relative_position_bias_table" not in name)
    assert without_tables == 27_145_824


def test_patch_merging_and_expanding_are_spatial_inverses():
    merge, expand = swin_unetr.PatchMergingV2(3, spatial_dims=2), PatchExpand(6, 3, scale=2)
    for module in (merge, expand):
        module.norm = torch.nn.Identity()
    merge.reduction = torch.nn.Identity()
    order = torch.eye(12).view(4, 3, 12)[[0, 2, 1, 3]].flatten(0, 1)  # merging goes down columns, expanding along rows
    expand.expand.weight = torch.nn.Parameter(order)
    x = torch.rand(2, 4, 6, 3)
    torch.testing.assert_close(expand(merge(x)), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_logits_have_the_images_size(training, channels):
    assert build_network(TINY).train(training)(torch.rand(2, channels, 16, 48)).shape == (2, 1, 16, 48)


@pytest.mark.parametrize("drop_path", [0.0, 0.9])
def test_every_parameter_gets_a_gradient_even_in_skipped_branches(drop_path):
    network = SwinUNet(embed_dim=4, depths=(2, 2), heads=(1, 2), window=2, drop_path=drop_path).train()
    network(torch.rand(1, 1, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_stochastic_depth_grows_with_depth_and_only_in_training():
    network = SwinUNet(embed_dim=4, depths=(2, 3), heads=(1, 2), window=2, drop_path=0.4)

    def rates(stages):
        paths = (block.drop_path for stage in stages for block in stage.blocks)
        return [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]

    assert rates(network.encoder) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert rates(network.decoder) == pytest.approx([0.0, 0.1])
    images = torch.rand(2, 1, 32, 32)
    assert not torch.equal(network.train()(images), network(images))
    assert torch.equal(network.eval()(images), network(images))


def test_channels_last_images_give_the_same_logits():
    network, images = build_network(TINY).eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(images.to(memory_format=torch.channels_last)), network(images))


def test_bf16_autocast_gives_close_logits_and_gradients():
    network, images = build_network(TINY).eval(), torch.rand(2, 1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    torch.testing.assert_close(logits.float(), network(images), atol=0.02, rtol=0.05)
    logits.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("size", [(16, 24), (40, 16)])
def test_image_size_that_windows_do_not_tile_is_a_clear_error(size):
    fit = (
        rf"image_size: {size[1]}x{size[0]} does not fit the network\. With network.window 2 it must be a multiple of 16"
    )
    with pytest.raises(UserError, match=fit):
        build_network(TINY)(torch.rand(1, 1, *size))


def test_it_does_not_need_einops(monkeypatch):
    """MONAI imports it where it is installed, and does not depend on it."""
    monkeypatch.delattr(swin_unetr, "rearrange")
    assert build_network(TINY)(torch.rand(2, 1, 16, 48)).shape == (2, 1, 16, 48)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embed_dim", 0),
        ("depths", ()),
        ("depths", (2, 0, 2, 2)),
        ("heads", (3, 6, 12)),
        ("heads", (3, 6, 12, 25)),
        ("heads", (0, 6, 12, 24)),
        ("window", 1),
        ("drop_path", 1.0),
        ("drop_path", -0.1),
    ],
)
def test_invalid_value_error_names_the_key(key, value):
    with pytest.raises(ValueError, match=rf"{key} .* got "):
        SwinUNetConfig(**{key: value})
