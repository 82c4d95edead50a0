"""Each baseline's step against its formula reimplemented in float64: ten steps, losses, gradients and teachers.

As in test_golden.py nothing of the package computes the expected values. Shared is only the order of random draws.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from equations import Reference, bce, mse, supervised
from torch.func import functional_call

from mgcc_dist.methods.config import (
    BidirectionalCopyPasteConfig,
    CrossConsistencyTrainingConfig,
    CrossPseudoSupervisionConfig,
    CrossTeachingConfig,
    CutMixTeacherConfig,
    DeepCoTrainingConfig,
    FixMatchConfig,
    MeanTeacherConfig,
    UncertaintyAwareMeanTeacherConfig,
    UniMatchConfig,
)
from mgcc_dist.methods.method import build
from mgcc_dist.models.config import CCTConfig, MGCCConfig, SwinUNetConfig, UNetConfig
from mgcc_dist.train.schedules import Progress

N, U, TOTAL = 2, 3, 20_000
CONFIDENCE = 0.52  # an untrained network never reaches the 0.97 of cutmix_teacher
MIXER = {"taps": (1, 2, 3), "gates": (True, False, True, True)}
UNET = UNetConfig(widths=(3, 4, 5))
SWIN = SwinUNetConfig(embed_dim=4, depths=(2, 2), heads=(1, 2), window=2, drop_path=0.0)
MGCC = MGCCConfig(widths=(3, 4, 5), kernel_size=3, **MIXER)


@dataclass
class Step:
    """What a formula may look at: tensors by name, the batch, the step, the module (for what is not re-derived)."""

    w: dict
    images: torch.Tensor
    weak: torch.Tensor
    masks: torch.Tensor
    number: int
    module: torch.nn.Module

    @property
    def unlabeled(self):
        return self.images[N:]

    def network(self, prefix, **options):
        own = {name.removeprefix(prefix): value for name, value in self.w.items() if name.startswith(prefix)}
        return Reference(own, **options)


def box_of(s, height, width, top, left):
    """Pixels of a box, relative to the image: bool [S,S]."""
    side = s.images.shape[-1]
    inside = torch.zeros(side, side, dtype=torch.bool)
    for row in range(side):
        for column in range(side):
            y, x = (row + 0.5) / side - top * (1 - height), (column + 0.5) / side - left * (1 - width)
            inside[row, column] = 0 <= y < height and 0 <= x < width
    return inside


def paste(x, boxes):
    mixed = x.clone()
    for i, inside in enumerate(boxes):
        mixed[i, :, inside] = x[i - 1, :, inside]
    return mixed


def brightened(x):
    """A strong view that is simple enough to be computed here too."""
    return x * (0.5 + torch.rand(len(x), 1, 1, 1, dtype=x.dtype))


def sure(p):
    confident = ((p >= CONFIDENCE) | (p <= 1 - CONFIDENCE)).double()
    assert 0 < confident.mean() < 1  # else the threshold would not be tested
    return (p > 0.5).double().detach(), confident


def cutmix_boxes(s):
    """UniMatch's boxes for half of the images: area 2 to 40 %, height / width 0.3 to 1 / 0.3, at most the image."""
    area, ratio, top, left, drawn = torch.rand(5, U)
    boxes = []
    for i in range(U):
        a, r = 0.02 + 0.38 * area[i], 0.3 + (1 / 0.3 - 0.3) * ratio[i]
        height, width = (min(1, side) for side in ((a * r) ** 0.5, (a / r) ** 0.5))
        boxes.append(box_of(s, height, width, top[i], left[i]) & (drawn[i] < 0.5))
    return boxes


def sure_bce(p, y, confident):
    return -(confident * (y * p.log() + (1 - y) * (1 - p).log())).sum() / y.numel()


def two_class_dice(p, y, region):
    loss = 0
    for a, b in ((p, y), (1 - p, 1 - y)):
        a, b = a[region > 0], b[region > 0]
        loss = loss + (1 - (2 * (a * b).sum() + 1e-5) / ((a**2).sum() + (b**2).sum() + 1e-5)) / 2
    return loss


def add_noise(x):
    """SSL4MIS's noise on images in [0,1], on images in [-1,1]."""
    unit = (x + 1) / 2 + torch.clamp(torch.randn(x.shape, dtype=x.dtype) * 0.1, min=-0.2, max=0.2)
    return 2 * unit - 1


def mean_teacher(s):
    target = s.network("teacher.").unet(add_noise(s.unlabeled))
    p = s.network("student.").unet(s.images)
    return supervised(p[:N], s.masks), (0 if s.number < 1000 else 1) * mse(p[N:], target), mse(p[N:], target)


def uamt(s):
    target = s.network("teacher.").unet(add_noise(s.unlabeled))
    passes = [s.network("teacher.").unet(add_noise(torch.cat([s.unlabeled, s.unlabeled]))) for _ in range(4)]
    p = sum(each for both in passes for each in (both[:U], both[U:])) / 8
    p, target = torch.cat([p, 1 - p], 1), torch.cat([target, 1 - target], 1)  # SSL4MIS's softmax of two classes
    entropy = -(p * torch.log(p + 1e-6)).sum(1, keepdim=True)
    ramp = math.exp(-5 * (1 - s.number / TOTAL) ** 2)
    sure = (entropy < (0.75 + 0.25 * ramp) * math.log(2)).double()
    assert 0 < sure.mean() < 1  # else the mask would not be tested
    student = s.network("student.").unet(s.images)
    both = torch.cat([student, 1 - student], 1)[N:]
    term = (sure * (both - target) ** 2).sum() / (2 * sure.sum() + 1e-16)
    return supervised(student[:N], s.masks), term, term


def dct_rotation(s):
    k = int(torch.randint(4, ()))
    network = s.network("first.")
    p, of_rotated = network.unet(s.images), network.unet(torch.rot90(s.unlabeled, k, (2, 3)))
    rotated = torch.rot90(p[N:], k, (2, 3))
    term = (mse(of_rotated, rotated.detach()) + mse(of_rotated.detach(), rotated)) / 2
    return supervised(p[:N], s.masks), term, term


def dct_two_networks(s):
    images = s.images.clone().requires_grad_()
    networks = [s.network("first."), s.network("second.")]
    p, q = (network.unet(images) for network in networks)

    def entropy(r):
        return -(r * r.log() + (1 - r) * (1 - r).log())

    term = (entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2)[N:].mean()  # Jensen-Shannon divergence
    for own, other in ((p, networks[1]), (q, networks[0])):
        labels = torch.cat([s.masks, (own[N:] > 0.5).double()])
        (slope,) = torch.autograd.grad(bce(own, labels), images, retain_graph=True)
        attacked = other.unet((images + 0.02 * slope.sign()).detach())
        term = term - (own.detach() * attacked.log() + (1 - own.detach()) * (1 - attacked).log()).mean()
    return supervised(p[:N], s.masks) + supervised(q[:N], s.masks), term, term


def cps(s):
    p, q = s.network("first.").unet(s.images), s.network("second.").unet(s.images)
    term = bce(p[N:], (q[N:].detach() > 0.5).double()) + bce(q[N:], (p[N:].detach() > 0.5).double())
    return supervised(p[:N], s.masks) + supervised(q[:N], s.masks), term, term


def ctbct(s):
    p = s.network("first.").unet(s.images)
    transformer = {name.removeprefix("second."): w for name, w in s.w.items() if name.startswith("second.")}
    q = torch.sigmoid(functional_call(s.module.second, transformer, (s.images,)))  # its network has tests of its own
    masks, everywhere = [(r[N:].detach() > 0.5).double() for r in (p, q)], torch.ones_like(p[N:])
    term = two_class_dice(p[N:], masks[1], everywhere) + two_class_dice(q[N:], masks[0], everywhere)
    return supervised(p[:N], s.masks) + supervised(q[:N], s.masks), term, term


def cct(s):
    main, *auxiliary = s.network("network.").cct(s.images)
    on_labels = sum(supervised(p[:N], s.masks) for p in (main, *auxiliary)) / 4
    term = sum(mse(main[N:], p[N:]) for p in auxiliary) / 3
    return on_labels, term, term


def cutmix_teacher(s):
    p = s.network("teacher.", **MIXER, running=True).mgcc_main(s.unlabeled)
    confident_fraction = ((p > CONFIDENCE) | (p < 1 - CONFIDENCE)).double().mean()
    assert confident_fraction > 0  # else the term would not be tested
    share, top, left = torch.rand(3, U)
    boxes = [box_of(s, 0.5**a, 0.5 ** (1 - a), y, x) for a, y, x in zip(share, top, left, strict=True)]
    mixed, target = paste(s.unlabeled, boxes), paste(p, boxes)
    decoders = s.network("network.", **MIXER).mgcc(torch.cat([s.images[:N], mixed]))
    term = confident_fraction * sum(mse(q[N:], target) for q in decoders) / 4
    return sum(supervised(q[:N], s.masks) for q in decoders) / 4, term, term


def fixmatch(s, loss=sure_bce):
    network = s.network("network.")
    p = network.unet(torch.cat([s.images[:N], s.weak[N:]]))
    masks, confident = sure(p[N:])
    boxes = cutmix_boxes(s)
    strong = brightened(s.weak[N:])
    term = loss(network.unet(paste(strong, boxes)), paste(masks, boxes), paste(confident, boxes))
    return supervised(p[:N], s.masks), term, term


def fixmatch_dice(s):
    return fixmatch(s, two_class_dice)


def unimatch(s):
    network = s.network("network.")
    features = network.encoder(torch.cat([s.images[:N], s.weak[N:]]))
    dropped = [x * torch.nn.functional.dropout2d(torch.ones_like(x)) for x in features]
    both = [torch.cat(pair) for pair in zip(features, dropped, strict=True)]
    p, perturbed = torch.sigmoid(network.decoder("decoder", both, gated=False)).chunk(2)
    masks, confident = sure(p[N:])
    views, targets = [], []
    for _ in range(2):
        boxes = cutmix_boxes(s)
        views.append(paste(brightened(s.weak[N:]), boxes))
        targets.append((paste(masks, boxes), paste(confident, boxes)))
    first, second = network.unet(torch.cat(views)).chunk(2)
    term = sure_bce(first, *targets[0]) / 4 + sure_bce(second, *targets[1]) / 4
    term = term + sure_bce(perturbed[N:], masks, confident) / 2
    return supervised(p[:N], s.masks), term, term


def bcp(s):
    side = s.images.shape[-1]
    box = side * 2 // 3
    top, left = (int(x * (side - box)) for x in torch.rand(2))
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top : top + box, left : left + box] = True
    student = s.network("student.")

    def pasted(x, y):
        return torch.where(inside, x, y)

    def loss(p, y, region):
        a, b = p[:, :, region], y[:, :, region]
        return bce(a, b) / 2 + two_class_dice(a, b, torch.ones_like(a)) / 2

    first, second = s.images[:N]
    y = s.masks
    if s.number < 0.25 * TOTAL:
        p = student.unet(torch.stack([pasted(second, first), pasted(first, second)]))
        return loss(p, y, ~inside) + loss(p, y.flip(0), inside), 0, torch.zeros(())
    predicted = s.network("teacher.").unet(s.weak[N:]) > 0.5
    pseudo = torch.stack([largest(mask)[None] for mask in predicted[:, 0]])
    assert 0 < pseudo.sum() < predicted.sum()  # else the components would not be tested
    a, b, c = s.unlabeled
    inward = student.unet(torch.stack([pasted(first, a), pasted(second, b), pasted(first, c)]))
    outward = student.unet(torch.stack([pasted(b, first), pasted(c, second)]))
    on_labels = loss(inward, y[[0, 1, 0]], inside) + loss(outward, y, ~inside)
    term = loss(inward, pseudo, ~inside) + loss(outward, pseudo[[1, 2]], inside)
    return on_labels, term, term


def largest(mask):
    """The first of the largest sets of pixels connected along edges."""
    left, components = {tuple(pixel) for pixel in mask.nonzero().tolist()}, []
    for start in mask.nonzero().tolist():
        queue, component = [tuple(start)], []
        while queue:
            y, x = queue.pop()
            if (y, x) in left:
                left.remove((y, x))
                component.append((y, x))
                queue += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        components.append(component)
    kept = torch.zeros(mask.shape, dtype=torch.float64)
    for pixel in max(components, key=len, default=()):
        kept[pixel] = 1
    return kept


@pytest.mark.parametrize(
    ("formula", "config", "network"),
    [
        pytest.param(mean_teacher, MeanTeacherConfig(ramp="ssl4mis"), UNET, id="mean_teacher"),
        pytest.param(uamt, UncertaintyAwareMeanTeacherConfig(ramp="ssl4mis", teacher_decay=0.99), UNET, id="uamt"),
        pytest.param(dct_rotation, DeepCoTrainingConfig(ramp="ssl4mis"), UNET, id="dct-rotation"),
        pytest.param(
            dct_two_networks, DeepCoTrainingConfig(ramp="ssl4mis", views="two_networks"), UNET, id="dct-networks"
        ),
        pytest.param(cps, CrossPseudoSupervisionConfig(ramp="ssl4mis"), UNET, id="cps"),
        pytest.param(ctbct, CrossTeachingConfig(ramp="ssl4mis", swin_unet=SWIN), UNET, id="ctbct"),
        pytest.param(cct, CrossConsistencyTrainingConfig(ramp="ssl4mis"), CCTConfig(widths=(3, 4, 5)), id="cct"),
        pytest.param(cutmix_teacher, CutMixTeacherConfig(ramp="ssl4mis"), MGCC, id="cutmix_teacher"),
        pytest.param(fixmatch, FixMatchConfig(confidence=CONFIDENCE), UNET, id="fixmatch"),
        pytest.param(
            fixmatch_dice,
            FixMatchConfig(confidence=CONFIDENCE, pseudo_loss="dice", unlabeled_weight=0.7),
            UNET,
            id="fixmatch-dice",
        ),
        pytest.param(unimatch, UniMatchConfig(confidence=CONFIDENCE), UNET, id="unimatch"),
        pytest.param(bcp, BidirectionalCopyPasteConfig(), UNET, id="bcp"),
    ],
)
def test_ten_steps_equal_the_formula_in_float64(formula, config, network, monkeypatch):
    monkeypatch.setattr("mgcc_dist.methods.cutmix_teacher.CONFIDENCE_THRESHOLD", CONFIDENCE)
    monkeypatch.setattr("mgcc_dist.methods.fixmatch.strong_view", brightened)
    monkeypatch.setattr("mgcc_dist.methods.unimatch.strong_view", brightened)
    torch.manual_seed(3)
    method = build(config, network).double().train()
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.3)
    images = torch.rand(N + U, 1, 16, 16, dtype=torch.float64) * 2 - 1
    masks = (images[:N] > 0.3).double()
    weak = images * 0.9
    batch = SimpleNamespace(images=images, masks=masks, labeled=N, weak_images=weak)
    teacher = {name: p.clone() for name, p in method.state_dict().items() if name.startswith("teacher.")}

    for number in range(10):
        step = number * 1900 if number else 0
        weight = getattr(config, "unlabeled_weight", 0.1 * math.exp(-5 * (1 - step // 150 / 200) ** 2))
        before = {name: value.clone() for name, value in method.state_dict().items()}
        torch.manual_seed(number)
        losses = method(batch, Progress(step, TOTAL, epoch=0.0, images=4 * step, seed=0))
        optimizer.zero_grad()
        losses["loss"].backward()

        leaves = {name: before[name].requires_grad_() for name, _ in trained}
        torch.manual_seed(number)
        seen = Step({**before, **teacher, **leaves}, images, weak, masks, step, method)
        on_labels, counted, consistency = formula(seen)
        gradients = torch.autograd.grad(on_labels + weight * counted, leaves.values())

        expected = {"loss": on_labels + weight * counted, "supervised": on_labels, "consistency": consistency}
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-9), (number, name)
        largest = max(gradient.abs().max() for gradient in gradients)
        for (name, parameter), gradient in zip(trained, gradients, strict=True):
            error = (parameter.grad - gradient).abs().max()
            assert error <= 2e-5 * largest, (number, name, error, largest)

        optimizer.step()
        method.after_step(Progress(step, TOTAL, epoch=0.0, images=4 * step, seed=0))
        if teacher:  # its own recursion, from the start
            decay = min(1 - 1 / (step + 1), config.teacher_decay)
            if step < getattr(config, "pretraining", 0) * TOTAL:
                decay = 0
            now = method.state_dict()
            student = "student." if config.name in ("mean_teacher", "uamt", "bcp") else "network."
            for name, value in teacher.items():
                learned = now[name.replace("teacher.", student)]
                averaged = name in dict(method.named_parameters())
                if averaged:
                    teacher[name] = decay * value + (1 - decay) * learned
                    torch.testing.assert_close(now[name], teacher[name], rtol=1e-9, atol=1e-12)
                elif config.name == "cutmix_teacher":
                    teacher[name] = learned.clone()
                    assert torch.equal(now[name], learned)
