"""Eq. 10 and 11 against values computed by hand or in float64."""

import math

import pytest
import torch

from mgcc_dist.methods.losses import consistency_loss, dice_loss, supervised_loss

CERTAIN = 50.0  # a logit whose sigmoid is 0 or 1 in float32


def test_dice_is_the_mean_over_images_not_over_the_batch():
    # image 1: predicted 4 pixels, true 2, overlap 2 -> Dice 4/6; image 2: predicted 1, true 1, overlap 0 -> Dice 0
    predicted = torch.tensor([[[[1, 1], [1, 1.0]]], [[[1, 0], [0, 0.0]]]])
    masks = torch.tensor([[[[1, 1], [0, 0.0]]], [[[0, 0], [0, 1.0]]]])
    logits = (2 * predicted - 1) * CERTAIN
    assert dice_loss(logits, masks).item() == pytest.approx((1 - 4 / 6 + 1) / 2, abs=1e-5)


def test_dice_of_an_empty_mask_predicted_empty_is_zero():
    assert dice_loss(torch.full((2, 1, 8, 8), -CERTAIN), torch.zeros(2, 1, 8, 8)).item() == pytest.approx(0, abs=1e-6)


def test_dice_of_an_empty_mask_predicted_full_is_one():
    assert dice_loss(torch.full((2, 1, 8, 8), CERTAIN), torch.zeros(2, 1, 8, 8)).item() == pytest.approx(1, abs=1e-5)


def test_smoothed_dice_adds_a_share_of_the_image_to_both_sides():
    logits, masks = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    masks[..., :4, :4] = 1
    # p = 1/2 on 64 pixels, 16 true, s = 0.25 * 64 = 16: Dice = (2 * 8 + 16) / (32 + 16 + 16)
    assert dice_loss(logits, masks, 0.25).item() == pytest.approx(1 - 32 / 64, abs=1e-6)


def test_smoothed_dice_gives_an_empty_mask_a_gradient():
    gradients = []
    for smooth in (0.0, 0.01):
        logits = torch.full((1, 1, 64, 64), -2.0, requires_grad=True)
        dice_loss(logits, torch.zeros(1, 1, 64, 64), smooth).backward()
        gradients.append(logits.grad.abs().sum().item())
    assert gradients[0] < 1e-6 < 0.05 < gradients[1]


def test_supervised_loss_is_half_bce_plus_dice():
    logits, masks = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0.0]]]])
    # p = 1/2 everywhere: BCE = ln 2, Dice = 2 * 0.5 / (2 + 1)
    assert supervised_loss(logits, masks).item() == pytest.approx(0.5 * math.log(2) + 1 - 1 / 3, abs=1e-5)


def test_consistency_is_the_mean_over_decoders_of_squared_differences_of_probabilities():
    main = torch.full((2, 1, 4, 4), CERTAIN)
    auxiliary = [torch.full((2, 1, 4, 4), CERTAIN), torch.full((2, 1, 4, 4), -CERTAIN), torch.zeros(2, 1, 4, 4)]
    loss = consistency_loss(main, auxiliary, detach_target=False)
    assert loss.item() == pytest.approx((0 + 1 + 0.25) / 3)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_target_stops_the_gradient_into_the_main_decoder(detach):
    main, auxiliary = torch.randn(2, 1, 3, 3, requires_grad=True), torch.randn(2, 1, 3, 3, requires_grad=True)
    consistency_loss(main, [auxiliary], detach).backward()
    assert auxiliary.grad.abs().sum() > 0
    if detach:
        assert main.grad is None
    else:
        assert torch.equal(main.grad.sign(), -auxiliary.grad.sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_float32(dtype):
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 1, 64, 64).to(dtype), (torch.rand(2, 1, 64, 64) > 0.5).float()
    with torch.autocast("cpu", dtype=dtype):
        supervised = supervised_loss(logits, masks)
        consistency = consistency_loss(logits, [logits.flip(0)], detach_target=False)
    exact = logits.double()
    assert supervised.dtype == consistency.dtype == torch.float32
    p, q = exact.sigmoid(), exact.flip(0).sigmoid()
    assert consistency.item() == pytest.approx((p - q).square().mean().item(), rel=1e-5)
    bce = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
    dice = 1 - ((2 * (p * masks).sum((1, 2, 3)) + 1e-5) / ((p + masks).sum((1, 2, 3)) + 1e-5)).mean()
    assert supervised.item() == pytest.approx((0.5 * bce + dice).item(), rel=1e-5)
