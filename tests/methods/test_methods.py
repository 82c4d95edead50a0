"""The contract of every method with the training loop and with inference."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.distributed import seed_step
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.batch import Batch
from mgcc_dist.methods.config import METHODS
from mgcc_dist.methods.cutmix_teacher import random_boxes
from mgcc_dist.methods.method import build
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.methods.teacher import update_teacher
from mgcc_dist.models.config import CCTConfig, MGCCConfig, SwinUNetConfig, UNetConfig
from mgcc_dist.train.flops import count_flops
from mgcc_dist.train.schedules import Progress
from mgcc_dist.train.weights import meta_copy

SWIN = SwinUNetConfig(embed_dim=4, depths=(2, 2), heads=(1, 2), window=2)
NETWORKS = {
    "unet": UNetConfig(widths=(4, 8, 8)),
    "swin_unet": SWIN,
    "cct": CCTConfig(widths=(4, 8, 8)),
    "mgcc": MGCCConfig(widths=(4, 8, 8), taps=(1, 2, 3), kernel_size=3),
}
PAIRS = [
    *(("supervised", network) for network in NETWORKS),
    *((method, "unet") for method in ("mean_teacher", "uamt", "dct", "cps", "ctbct", "fixmatch", "unimatch", "bcp")),
    *(("cps", "swin_unet"), ("cct", "cct"), ("mgcc", "mgcc"), ("cutmix_teacher", "mgcc"), ("cutmix_teacher", "cct")),
]
PROGRESS = Progress(step=30_000, total_steps=40_000, epoch=1.0, images=120_000, seed=0)


def batch_of(labeled, unlabeled, side=16):
    generator = torch.Generator().manual_seed(labeled + 10 * unlabeled)
    images = torch.rand(labeled + unlabeled, 1, side, side, generator=generator) * 2 - 1
    masks = (torch.nn.functional.avg_pool2d(images[:labeled], 5, 1, 2) > 0.1).float()
    return SimpleNamespace(images=images, masks=masks, labeled=labeled, weak_images=images)


def configured(method, **options):
    return METHODS.get(method).config(**({"swin_unet": SWIN} if method == "ctbct" else {}) | options)


def made(method, network, **options):
    torch.manual_seed(0)
    return build(configured(method, **options), NETWORKS[network])


def test_every_method_is_tested_here():
    assert {method for method, _ in PAIRS} == set(METHODS.names())


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_every_trained_parameter_gets_a_gradient_as_ddp_requires(method, network):
    module = made(method, network)
    losses = module(batch_of(2, 3), PROGRESS)
    losses["loss"].backward()
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert [name for name, p in module.named_parameters() if p.grad is None and p.requires_grad] == []


@pytest.mark.parametrize(("method", "network"), [pair for pair in PAIRS if pair[1] != "swin_unet"])
def test_every_method_trains_bfloat16_weights_as_deepspeed_gives_them(method, network):
    """Its engine casts tensors but no batches. The losses are float32."""
    batch = batch_of(2, 2)
    module = made(method, network).bfloat16()
    losses = module(Batch(batch.images, batch.masks, torch.arange(4), [], weak=batch.images), PROGRESS)
    losses["loss"].backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("pair", ["dct:unet", "ctbct:unet", "cutmix_teacher:cct"])
def test_the_flops_of_a_method_are_counted_without_running_it(pair):
    module, batch = made(*pair.split(":")), batch_of(2, 3)
    tensors = Batch(batch.images, batch.masks, torch.arange(5), [])
    on_cpu = SimpleNamespace(to=lambda device: tensors)
    assert count_flops(meta_copy(module), tensors, PROGRESS) == count_flops(module, on_cpu, PROGRESS) > 0


@pytest.mark.parametrize(("method", "network"), [pair for pair in PAIRS if hasattr(configured(pair[0]), "dice_smooth")])
def test_a_smoother_dice_lowers_the_supervised_loss_of_every_method_that_has_the_key(method, network):
    losses = []
    for smooth in (0.0, 0.5):
        module = made(method, network, dice_smooth=smooth)
        torch.manual_seed(1)
        losses.append(module(batch_of(2, 3), PROGRESS)["supervised"].item())
    assert losses[1] < losses[0] - 0.05


def test_networks_that_teach_each_other_start_from_different_weights():
    for module in (made("cps", "unet"), made("dct", "unet", views="two_networks")):
        first, second = (torch.cat([p.flatten() for p in n.parameters()]) for n in (module.first, module.second))
        assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("method", "network"), [("mean_teacher", "unet"), ("uamt", "unet"), ("bcp", "unet"), ("cutmix_teacher", "mgcc")]
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
    progress = Progress(0, 100, epoch=0.0, images=0, seed=0)
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
    fresh = build(configured(method), NETWORKS[network]).predictor()
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


@pytest.mark.parametrize("method", ["fixmatch", "unimatch"])
def test_pixels_that_are_not_confident_have_no_loss(method):
    losses = made(method, "unet", confidence=1.0)(batch_of(2, 3), PROGRESS)
    assert losses["confident"].item() == losses["consistency"].item() == 0.0


def test_bcp_learns_from_labeled_images_only_while_it_pretrains():
    module, batch = made("bcp", "unet", pretraining=0.25), batch_of(2, 3)
    batch.images[2:] = float("nan")
    for step, finite in ((9_999, True), (10_000, False)):
        assert module(batch, Progress(step, 40_000, epoch=0.0, images=4 * step, seed=0))["loss"].isfinite() == finite
    assert configured("bcp").fixed_length
    assert not configured("bcp", pretraining=0.0).fixed_length


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


@pytest.mark.parametrize(
    ("method", "network", "needed"),
    [
        ("mgcc", "unet", "needs a network with auxiliary outputs, and unet has none"),
        ("cutmix_teacher", "swin_unet", "needs a network with auxiliary outputs, and swin_unet has none"),
        ("ctbct", "mgcc", "needs a network without auxiliary outputs, and mgcc has 3"),
        ("uamt", "cct", "needs a network without auxiliary outputs, and cct has 3"),
        ("unimatch", "swin_unet", "needs a network with separate encoder and decoder, such as unet, and swin_unet"),
    ],
)
def test_method_refuses_a_network_it_cannot_train(method, network, needed):
    with pytest.raises(UserError, match=f"network.name: method {method} {needed}"):
        build(configured(method), NETWORKS[network])
    with pytest.raises(UserError, match=f"network.name: method {method} {needed}"):
        parse(SegmentConfig, ["--method", method, "--network", network], CONFIGS / "segment", "mgcc_demo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network.taps [6,3]", "network.taps must be positive and increase"),
        ("--network.kernel_size 4", "network.kernel_size must be odd"),
        ("--network.gates [true]", "network.gates needs 4 values"),
        ("--network.perturb some", "network.perturb: expected one of all_levels, bottleneck"),
        ("--network.widths [a]", "network.widths: expected a list of integers"),
        (
            "--network unet --network.taps [1]",
            "network.taps: network unet has no such key. Its keys: name, in",
        ),
        ("--method ctbct --network unet --method.swin_unet.window 1", "method.swin_unet.window must be at least 2"),
        (
            "--method.views rotation",
            "method.views: method mgcc has no such key. Its keys: name, dice_smooth, ramp, detach_target.",
        ),
    ],
)
def test_a_wrong_key_is_a_one_line_error(words, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        parse(SegmentConfig, words.split(), CONFIGS / "segment", "mgcc_demo")
    assert "\n" not in str(caught.value)
