"""What every method promises to the training loop and to prediction."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch

from mgcc_dist.config import parse
from mgcc_dist.errors import UserError
from mgcc_dist.methods import MethodConfig, build
from mgcc_dist.models import NetworkConfig
from mgcc_dist.schedules import Progress

NETWORKS = {
    "unet": NetworkConfig("unet", widths=(4, 8, 8)),
    "mgcc": NetworkConfig("mgcc", widths=(4, 8, 8), taps=(1, 2, 3), kernel_size=3),
}
PAIRS = [("supervised", "unet"), ("supervised", "mgcc"), ("mgcc", "mgcc")]
PROGRESS = Progress(step=30_000, total_steps=40_000, epoch=1.0, seed=0)


def batch_of(labeled, unlabeled, side=16):
    generator = torch.Generator().manual_seed(labeled + 10 * unlabeled)
    images = torch.rand(labeled + unlabeled, 1, side, side, generator=generator) * 2 - 1
    masks = (torch.nn.functional.avg_pool2d(images[:labeled], 5, 1, 2) > 0.1).float()
    return SimpleNamespace(images=images, masks=masks, labeled=labeled)


def made(method, network, **options):
    torch.manual_seed(0)
    return build(MethodConfig(method, **options), NETWORKS[network])


@pytest.mark.parametrize(("method", "network"), PAIRS)
@pytest.mark.parametrize("unlabeled", [0, 3])
def test_every_parameter_gets_a_gradient_so_that_ddp_waits_for_none(method, network, unlabeled):
    module = made(method, network)
    losses = module(batch_of(2, unlabeled), PROGRESS)
    losses["loss"].backward()
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_a_few_steps_lower_the_loss(method, network):
    module, batch = made(method, network), batch_of(4, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    progress = Progress(0, 100, 0.0, 0)
    seen = []
    for _ in range(25):
        loss = module(batch, progress)["supervised"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert sum(seen[-5:]) / 5 < 0.9 * seen[0]


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_bf16_autocast_gives_float32_losses_near_those_without(method, network):
    batch, losses = batch_of(4, 4, side=32), {}
    for enabled in (False, True):
        module = made(method, network)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses[enabled] = module(batch, PROGRESS)
    for name, value in losses[True].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(losses[False][name].item(), rel=0.1, abs=0.01), name


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_predictor_s_weights_alone_rebuild_the_same_prediction(method, network):
    module = made(method, network)
    module(batch_of(2, 2), PROGRESS)  # moves the running statistics
    images = batch_of(2, 0).images
    saved = {name: tensor.clone() for name, tensor in module.predictor().state_dict().items()}
    assert not any("auxiliary" in name for name in saved)
    torch.manual_seed(99)
    fresh = build(MethodConfig(method), NETWORKS[network]).predictor()
    fresh.load_state_dict(saved)
    module.eval()
    torch.testing.assert_close(fresh.eval()(images), module.predictor()(images))


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_predictor_of_a_copy_is_the_copy_s(method, network):
    module = made(method, network).eval()
    average = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    images = batch_of(2, 0).images
    assert not torch.allclose(average.predictor()(images), module.predictor()(images))


def test_supervised_training_does_not_look_at_unlabeled_images():
    labeled, more = batch_of(2, 0), batch_of(2, 0)
    more.images = torch.cat([labeled.images, torch.full((3, 1, 16, 16), float("nan"))])
    losses = [made("supervised", "unet")(batch, PROGRESS)["loss"] for batch in (labeled, more)]
    assert torch.equal(*losses)


def test_mgcc_normalises_labeled_and_unlabeled_images_together():
    module = made("mgcc", "mgcc")
    seen = []
    module.network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    module(batch_of(2, 3), PROGRESS)
    assert seen == [5]


def test_mgcc_learns_consistency_from_unlabeled_images_only():
    module, batch = made("mgcc", "mgcc"), batch_of(2, 3)
    module.network.register_forward_hook(
        lambda *_: (
            torch.zeros(5, 1, 16, 16),
            [torch.cat([torch.full((2, 1, 16, 16), 9.0), torch.zeros(3, 1, 16, 16)])],
        )
    )
    assert module(batch, PROGRESS)["consistency"].item() == 0.0


def test_mgcc_without_unlabeled_images_is_its_supervised_loss():
    losses = made("mgcc", "mgcc")(batch_of(2, 0), PROGRESS)
    assert losses["consistency"].item() == 0.0
    assert losses["loss"].item() == losses["supervised"].item()


def test_the_same_seed_gives_the_same_step():
    def step():
        module = made("mgcc", "mgcc")
        torch.manual_seed(5)
        return module(batch_of(2, 2), PROGRESS)["loss"]

    assert torch.equal(step(), step())


def test_unknown_method_is_refused_with_the_names_that_exist():
    with pytest.raises(UserError, match=re.escape("method.name 'mgc' is not known; choose one of mgcc, supervised")):
        build(MethodConfig("mgc"), NETWORKS["unet"])


def test_mgcc_refuses_a_network_without_auxiliary_decoders():
    with pytest.raises(UserError, match=r"method\.name mgcc needs network\.name mgcc, got unet"):
        build(MethodConfig("mgcc"), NETWORKS["unet"])


def test_configs_read_from_a_command_line():
    words = ["--name", "unet", "--widths", "[8, 16]", "--taps", "[2]", "--gates", "[true, false]"]
    assert parse(NetworkConfig, "x", "", argv=words) == NetworkConfig("unet", 3, (8, 16), (2,), 7, (True, False))
    words = ["--ramp", "paper_0.1", "--detach_target", "true"]
    assert parse(MethodConfig, "x", "", argv=words) == MethodConfig("mgcc", "paper_0.1", True)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--taps", "[6, 3]"], "network.taps"),
        (["--kernel_size", "4"], "network.kernel_size"),
        (["--gates", "[true]"], "network.gates"),
        (["--perturb", "some"], "perturb"),
        (["--widths", "[a]"], "widths"),
    ],
)
def test_impossible_value_on_a_command_line_is_one_line_that_names_the_key(words, key):
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        parse(NetworkConfig, "x", "", argv=words)
    assert "\n" not in str(caught.value)
