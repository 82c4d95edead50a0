"""Formulas of uncertainty by hand, and the members that they are computed from."""

import numpy as np
import pytest
import torch
from predict_runs import SIZE, save_with_checkpoint
from torch import nn

from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.predictor import Predictor, load
from mgcc_dist.inference.uncertainty import Members, agreement, disagreement, load_decoders, open_members
from mgcc_dist.methods.config import CrossConsistencyTrainingConfig, MultiLevelCrossConsistencyConfig
from mgcc_dist.models.config import CCTConfig, MGCCConfig

SQUARE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def test_disagreement_by_hand():
    members = torch.tensor([[0.0, 0.5, 1.0, 0.9], [1.0, 0.5, 1.0, 0.5]])
    mean = -(0.7 * np.log2(0.7) + 0.3 * np.log2(0.3))
    inside = -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.1))
    expected = [1.0, 0.0, 0.0, mean - (inside + 1) / 2]
    np.testing.assert_allclose(disagreement(members), expected, atol=1e-6)


def test_agreement_of_sure_members_is_the_mean_dice_of_all_pairs():
    masks = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])[:, None]
    assert agreement(masks) == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_agreement_of_unsure_members_by_hand():
    members = torch.tensor([[0.5, 0.0], [0.8, 0.2]])[:, None]
    assert agreement(members) == pytest.approx(2 * 0.5 * 0.8 / (0.5 + 1.0))


def test_images_without_a_lesion_have_a_low_score():
    empty, full = torch.zeros(4, 4), torch.ones(4, 4)
    assert agreement(torch.stack([empty, empty])) == 0
    assert agreement(torch.stack([empty, full])) == 0
    assert agreement(torch.full((3, 4, 4), 0.01)) == pytest.approx(0.01)
    assert agreement(torch.stack([full, full, empty])) == pytest.approx(1 / 3)


def test_equal_members_agree_and_order_does_not_matter():
    members = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    same = members[:1].expand(3, -1, -1)
    assert agreement((same > 0.5).float()) == 1
    np.testing.assert_allclose(disagreement(same), 0, atol=1e-6)
    assert agreement(members) == pytest.approx(agreement(members.flip(0)))
    assert ((disagreement(members) >= 0) & (disagreement(members) <= 1)).all()


class Bright(nn.Module):
    """Logits are the image itself, wherever it is."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.gain * x


class Ramp(Bright):
    def forward(self, x):
        return self.gain * torch.linspace(-1, 1, x.shape[-1]).expand_as(x)


def test_mirrored_views_are_turned_back():
    (members,) = Members([Predictor(Bright(), SIZE, device="cpu", precision="no")], flips=True).squares([SQUARE])
    assert members.shape == (4, SIZE, SIZE)
    torch.testing.assert_close(members, members[:1].expand(4, -1, -1))
    (members,) = Members([Predictor(Ramp(), SIZE, device="cpu", precision="no")], flips=True).squares([SQUARE])
    torch.testing.assert_close(members[1], members[0].flip(1))


@pytest.mark.parametrize(
    ("method", "network"),
    [
        (MultiLevelCrossConsistencyConfig(), MGCCConfig(widths=(2, 4), taps=(1, 2), gates=(True, True, True))),
        (CrossConsistencyTrainingConfig(), CCTConfig(widths=(2, 4))),
    ],
    ids=["mgcc", "cct"],
)
def test_decoders_are_those_of_training_without_perturbations(tmp_path, monkeypatch, method, network):
    trained = save_with_checkpoint(tmp_path, method, network)
    predictors = load_decoders(load(tmp_path, "last", "cpu", "no"))
    for name in ("mgcc", "cct"):
        monkeypatch.setattr(f"mgcc_dist.models.{name}.perturbed", lambda features, *_: features)
    trained.eval()
    trained.network.training = True  # all decoders, with the statistics of evaluation
    x = torch.from_numpy(SQUARE)[None, None] / 127.5 - 1
    with torch.no_grad():
        main, auxiliary = trained.network(x)
    assert len(predictors) == 1 + len(auxiliary)
    (members,) = Members(predictors).squares([SQUARE])
    torch.testing.assert_close(members, torch.cat([main, *auxiliary])[:, 0].sigmoid())


def test_decoders_are_refused_where_they_are_not_those_of_the_weights(tmp_path):
    save_with_checkpoint(tmp_path, MultiLevelCrossConsistencyConfig(), MGCCConfig(widths=(2, 4)))
    with pytest.raises(
        UserError, match=r"only in its newest checkpoint .* another step than .*best.* Pass --weights last, or"
    ):
        load_decoders(load(tmp_path, "best", "cpu", "no"))
    last = load(tmp_path, "last", "cpu", "no")
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not exist, and it has the auxiliary decoders"):
        load_decoders(last)
    with pytest.raises(UserError, match="needs two or more runs of different weights"):
        open_members("ensemble", [last], [tmp_path], "last")
    with pytest.raises(UserError, match="are the runs of an ensemble"):
        open_members("tta", [last], [tmp_path], "last")


def test_members_see_the_same_square():
    predictors = [Predictor(Bright(), size, device="cpu", precision="no") for size in (32, 64)]
    with pytest.raises(UserError, match="see images in different ways"):
        Members(predictors)
