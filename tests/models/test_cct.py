"""CCT: decoders, their input features, and the inference module."""

import pytest
import torch

from mgcc_dist.models import cct as cct_module
from mgcc_dist.models.cct import CCT
from mgcc_dist.models.config import CCTConfig
from mgcc_dist.models.network import build_network

TINY = (2, 3, 4)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def seen_by_decoders(network, images):
    """Input features of the main and of each auxiliary decoder in training mode."""
    seen, decoders = {}, [network.main, *network.auxiliary]
    for k, decoder in enumerate(decoders):
        decoder.register_forward_pre_hook(lambda _, inputs, k=k: seen.__setitem__(k, [f.detach() for f in inputs[0]]))
    network.train()(images)
    return [seen[k] for k in range(len(decoders))]


def test_inference_is_a_u_net_and_training_adds_three_decoders():
    with torch.device("meta"):
        network = CCT()
    assert round(count(network.inference_module()) / 1e6, 2) == 34.53
    assert round(count(network) / 1e6, 2) == 81.55
    assert count(network) - count(network.inference_module()) == 3 * count(network.main)


def test_training_gives_main_and_three_auxiliary_logits_and_every_parameter_a_gradient():
    network = CCT(widths=TINY).train()
    main, auxiliary = network(torch.rand(2, 1, 16, 24))
    assert [logits.shape for logits in (main, *auxiliary)] == [(2, 1, 16, 24)] * 4
    sum(logits.square().mean() for logits in (main, *auxiliary)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_evaluation_runs_only_the_main_decoder_on_clean_features():
    network = CCT(widths=TINY).eval()
    for decoder in network.auxiliary:
        decoder.register_forward_hook(lambda *_: pytest.fail("an auxiliary decoder ran"))
    images = torch.rand(2, 3, 16, 8)
    expected = network.main(network.encoder(images))
    assert torch.equal(network(images), expected)
    assert torch.equal(network.inference_module()(images), expected)


def test_auxiliary_decoders_get_f_noise_dropout_and_f_drop_on_all_levels():
    torch.manual_seed(0)
    main, *auxiliary = seen_by_decoders(CCT(widths=TINY), torch.rand(2, 1, 32, 32))
    for clean, noisy, thinned, dropped in zip(main, *auxiliary, strict=True):
        ratio = (noisy / clean)[clean > 1e-6]
        assert not torch.equal(noisy, clean)
        assert ratio.min() >= 0.699
        assert ratio.max() <= 1.301
        assert (thinned.isclose(clean / 0.7) | (thinned == 0)).all()
        kept = (dropped == clean).all(dim=1)  # a position keeps all its channels as they are, or none
        assert (kept | (dropped == 0).all(dim=1)).all()
        assert not kept.all()


@pytest.mark.parametrize(("perturb", "added"), [("all_levels", (1, 1, 1)), ("bottleneck", (0, 0, 1))])
def test_perturb_switches_between_all_levels_and_the_bottleneck(perturb, added, monkeypatch):
    monkeypatch.setattr(cct_module, "PERTURBATIONS", (lambda x: x + 1,) * 3)
    main, *auxiliary = seen_by_decoders(CCT(widths=TINY, perturb=perturb), torch.rand(2, 1, 16, 16))
    for features in auxiliary:
        for clean, feature, number in zip(main, features, added, strict=True):
            torch.testing.assert_close(feature, clean + number)


def test_inference_module_shares_weights_and_keys_with_the_full_network():
    network = build_network(CCTConfig(widths=TINY))
    part, whole = network.inference_module().state_dict(), network.state_dict()
    assert part.keys() == {name for name in whole if not name.startswith("auxiliary.")}
    assert all(part[name].data_ptr() == whole[name].data_ptr() for name in part)
