"""The contract of every method with the training loop and with inference."""

import copy
import re
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.distributed import seed_step
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.value_types import choices
from mgcc_dist.methods.config import MethodConfig, MethodName
from mgcc_dist.methods.cutmix_teacher import random_boxes
from mgcc_dist.methods.registry import METHODS, build
from mgcc_dist.methods.teacher import update_teacher
from mgcc_dist.models import registry
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.train.schedules import Progress

SWIN = {"embed_dim": 4, "depths": (2, 2), "heads": (1, 2), "window": 2}
NETWORKS = {
    "unet": NetworkConfig("unet", widths=(4, 8, 8), **SWIN),
    "swin_unet": NetworkConfig("swin_unet", **SWIN),
    "cct": NetworkConfig("cct", widths=(4, 8, 8)),
    "mgcc": NetworkConfig("mgcc", widths=(4, 8, 8), taps=(1, 2, 3), kernel_size=3),
}
PAIRS = [
    *(("supervised", network) for network in NETWORKS),
    *((method, "unet") for method in ("mean_teacher", "uamt", "dct", "cps", "ctbct")),
    *(("cps", "swin_unet"), ("cct", "cct"), ("mgcc", "mgcc"), ("cutmix_teacher", "mgcc"), ("cutmix_teacher", "cct")),
]
PROGRESS = Progress(step=30_000, total_steps=40_000, epoch=1.0, seed=0)


def batch_of(labeled, unlabeled, side=16):
    generator = torch.Generator().manual_seed(labeled + 10 * unlabeled)
    images = torch.rand(labeled + unlabeled, 1, side, side, generator=generator) * 2 - 1
    masks = (torch.nn.functional.avg_pool2d(images[:labeled], 5, 1, 2) > 0.1).float()
    return SimpleNamespace(images=images, masks=masks, labeled=labeled)


def made(method, network, **options):
    torch.manual_seed(0)
    return build(MethodConfig(method, **options), NETWORKS[network])


def test_every_method_is_tested_here():
    assert {method for method, _ in PAIRS} == METHODS.keys()


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_every_trained_parameter_gets_a_gradient_as_ddp_requires(method, network):
    module = made(method, network)
    losses = module(batch_of(2, 3), PROGRESS)
    losses["loss"].backward()
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert [name for name, p in module.named_parameters() if p.grad is None and p.requires_grad] == []


def test_networks_that_teach_each_other_start_from_different_weights():
    for module in (made("cps", "unet"), made("dct", "unet", views="two_networks")):
        first, second = (torch.cat([p.flatten() for p in n.parameters()]) for n in (module.first, module.second))
        assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("method", "network"), [("mean_teacher", "unet"), ("uamt", "unet"), ("cutmix_teacher", "mgcc")]
)
def test_teacher_follows_the_student_is_not_trained_and_does_not_predict(method, network):
    module, batch = made(method, network, teacher_decay=0.5), batch_of(2, 2)
    before = [p.clone() for p in module.teacher.parameters()]
    assert not any(p.requires_grad for p in module.teacher.parameters())
    module(batch, PROGRESS)["loss"].backward()
    for p in module.parameters():
        if p.requires_grad:
            p.data.sub_(0.1 * p.grad)
    assert all(torch.equal(old, new) for old, new in zip(before, module.teacher.parameters(), strict=True))
    module.after_step(PROGRESS)
    assert not all(torch.equal(old, new) for old, new in zip(before, module.teacher.parameters(), strict=True))
    teachers = {id(p) for p in module.teacher.parameters()}
    assert not teachers & {id(p) for p in module.predictor().parameters()}


def test_first_update_copies_the_student_into_the_teacher():
    student, teacher = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    update_teacher(teacher, student, decay=0.9, step=0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_teacher_decay_rises_to_its_maximum_and_stays():
    student, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, decay in ((1, 0.5), (3, 0.75), (9, 0.9), (500, 0.9)):
        before = teacher.weight.clone()
        update_teacher(teacher, student, decay=0.9, step=step)
        torch.testing.assert_close(teacher.weight, decay * before + (1 - decay) * student.weight)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), height=st.integers(8, 40), width=st.integers(8, 40))
def test_cutmix_box_is_a_rectangle_of_about_half_the_image(seed, height, width):
    torch.manual_seed(seed)
    for box in random_boxes(torch.zeros(3, 1, height, width))[:, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None, :])
        assert all(int((edge[1:] != edge[:-1]).sum()) <= 2 for edge in (rows.int(), columns.int()))
        assert abs(box.float().mean().item() - 0.5) < 1 / height + 1 / width


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
def test_predictor_weights_are_enough_to_rebuild_the_prediction(method, network):
    module = made(method, network)
    module(batch_of(2, 2), PROGRESS)  # moves the running statistics
    images = batch_of(2, 0).images
    saved = {name: tensor.clone() for name, tensor in module.predictor().state_dict().items()}
    if network != "swin_unet":
        assert not any("auxiliary" in name for name in saved)
    torch.manual_seed(99)
    fresh = build(MethodConfig(method), NETWORKS[network]).predictor()
    fresh.load_state_dict(saved)
    module.eval()
    torch.testing.assert_close(fresh.eval()(images), module.predictor()(images))


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_predictor_of_a_deepcopy_belongs_to_the_copy(method, network):
    module = made(method, network).eval()
    average = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    images = batch_of(2, 0).images
    assert not torch.allclose(average.predictor()(images), module.predictor()(images))


def test_supervised_training_ignores_unlabeled_images():
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


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_same_seed_gives_the_same_step(method, network):
    def losses(before):
        module = made(method, network)
        torch.manual_seed(before)  # what was drawn before does not matter
        seed_step(5, 17, 1)
        return module(batch_of(2, 2), PROGRESS)

    first, second = losses(0), losses(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_method_error_lists_the_methods():
    with pytest.raises(
        UserError, match=re.escape("method.name: unknown method 'mgc'. Choose one of supervised, mean_")
    ):
        build(MethodConfig("mgc"), NETWORKS["unet"])


@pytest.mark.parametrize(
    ("method", "needed"), [("mgcc", "mgcc"), ("cct", "cct"), ("ctbct", "unet"), ("uamt", "unet or cmunet or swin_unet")]
)
def test_method_refuses_a_network_it_cannot_train(method, needed):
    other = "mgcc" if method != "mgcc" else "unet"
    with pytest.raises(UserError, match=re.escape(f"network.name: method {method} needs {needed}, got {other}")):
        build(MethodConfig(method), NETWORKS[other])


def test_config_is_read_from_the_command_line():
    words = ["--name", "unet", "--widths", "[8, 16]", "--taps", "[2]", "--gates", "[true, false]"]
    assert parse(NetworkConfig, words) == NetworkConfig("unet", 3, (8, 16), (2,), 7, (True, False))
    words = ["--ramp", "paper_0.1", "--detach_target", "true"]
    assert parse(MethodConfig, words) == MethodConfig("mgcc", "paper_0.1", True)


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
def test_invalid_value_on_the_command_line_is_a_one_line_error_naming_the_key(words, key):
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        parse(NetworkConfig, words)
    assert "\n" not in str(caught.value)


def test_the_command_line_knows_every_method_and_network():
    assert set(get_args(MethodName)) == set(METHODS)
    assert set(choices(get_type_hints(NetworkConfig)["name"])) == set(registry.NETWORKS)
