"""The condition of a denoiser: class and lesion mask, any of them, and what a U-Net makes of them."""

from dataclasses import replace

import torch
from tiny_ldm import DENOISER, SHAPE

from mgcc_dist.diffusion import denoiser
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.denoiser import predict

LABELS = torch.tensor([0, 1])
MASK = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
NULL = Condition(torch.tensor([3, 3]), torch.zeros(2, 1, 4, 4))


def same(one, other):
    return torch.equal(one.labels, other.labels) and torch.equal(one.mask, other.mask)


def test_null_condition_is_the_one_of_dropped_images():
    condition = Condition(LABELS, MASK)
    assert same(condition.null(3), NULL)
    assert same(condition.drop(torch.tensor([True, True]), 3), NULL)
    second = condition.drop(torch.tensor([False, True]), 3)
    assert same(second, Condition(torch.tensor([0, 3]), torch.cat([MASK[:1], NULL.mask[:1]])))
    both = Condition.cat([condition, NULL])
    assert (both.labels.tolist(), both.mask.shape) == ([0, 1, 3, 3], (4, 1, 4, 4))
    assert Condition.cat([Condition(), Condition()]).null(3).is_empty
    assert Condition.cat([Condition(LABELS)] * 2).mask is None


def test_unet_takes_the_mask_as_last_channel_and_tells_no_mask_from_an_empty_one():
    torch.manual_seed(0)
    unet = denoiser.build(replace(DENOISER, classes=True, masks="all"), SHAPE, 3)
    z, t = torch.randn(2, *SHAPE), torch.tensor(5)
    with torch.no_grad():
        predicted = predict(unet, z, t, Condition(LABELS, MASK))
        torch.testing.assert_close(predicted, unet(torch.cat([z, MASK], dim=1), t, LABELS).sample)
        assert predicted.shape == z.shape
        masks = [MASK, -MASK, 0 * MASK]
        first = [predict(unet, z[:1], t, Condition(LABELS[:1], mask[:1])) for mask in masks]
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
