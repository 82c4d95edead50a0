"""MGCC's step against Eq. 3 to 12 written again in float64, on plain tensors: losses and gradients over ten steps.

Nothing of the package computes here but the method itself. The only thing shared is the order in which random numbers
are drawn: auxiliary decoder 1, 2, ... and in each the levels from shallow to deep.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d

from mgcc_dist.methods import MethodConfig, build
from mgcc_dist.models import NetworkConfig
from mgcc_dist.schedules import Progress

LABELED, UNLABELED, TOTAL = 2, 3, 40_000


class Reference:
    """The MGCC network in training mode as functions of a dict of tensors `w`."""

    def __init__(self, weights, taps, gates, perturb_skips, levels):
        self.w, self.taps, self.gates, self.perturb_skips, self.levels = weights, taps, gates, perturb_skips, levels

    def conv(self, name, x, **arguments):
        return conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **arguments)

    def norm(self, name, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scaled = (x - mean) / (variance + 1e-5) ** 0.5
        return scaled * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def double_conv(self, name, x):
        for part in "12":
            x = self.norm(f"{name}.norm{part}", self.conv(f"{name}.conv{part}", x, padding=1)).clamp(min=0)
        return x

    def mixer_layer(self, name, x):
        def gelu(y):
            return y * (1 + torch.erf(y / math.sqrt(2))) / 2

        side = self.w[f"{name}.depthwise.weight"].shape[-1] // 2
        deep = self.conv(f"{name}.depthwise", x, padding=side, groups=x.shape[1])
        x = self.norm(f"{name}.depthwise_norm", gelu(deep)) + x  # Eq. 3
        return self.norm(f"{name}.pointwise_norm", gelu(self.conv(f"{name}.pointwise", x)))  # Eq. 4

    def gate(self, name, f):
        kinds = {"pointwise": {}, "ordinary": {"padding": 1}, "dilated": {"padding": 2, "dilation": 2}}
        scales = [self.norm(f"{name}.{k}_norm", self.conv(f"{name}.{k}", f, **a)) for k, a in kinds.items()]
        joined = torch.cat(scales, 1).clamp(min=0)  # Eq. 5
        return f * torch.sigmoid(self.norm(f"{name}.vote_norm", self.conv(f"{name}.vote", joined))) + f  # Eq. 6

    def decoder(self, name, features, gated):
        x = features[-1]
        for level in range(self.levels - 2, -1, -1):
            skip = self.gate(f"{name}.gates.{level}", features[level]) if gated else features[level]
            up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            up = self.norm(f"{name}.ups.{level}.norm", self.conv(f"{name}.ups.{level}.conv", up, padding=1))
            x = self.double_conv(f"{name}.blocks.{level}", torch.cat([skip, up.clamp(min=0)], 1))
        return self.conv(f"{name}.head", x)

    def probabilities(self, images):
        """Main, auxiliary 1, 2, ..., each [B,1,H,W]."""
        x, features = images.repeat(1, 3, 1, 1), []
        for level in range(self.levels):
            x = self.double_conv(f"encoder.blocks.{level}", max_pool2d(x, 2) if level else x)
            features.append(x)
        *skips, bottleneck = features
        after = [bottleneck]
        for layer in range(self.taps[-1]):
            after.append(self.mixer_layer(f"mixer.{layer}", after[-1]))
        auxiliary = []
        for k, depth in enumerate((0, *self.taps[:-1])):
            perturb = (f_drop, dropout, f_noise)[k % 3]
            seen = [perturb(skip) if self.perturb_skips else skip for skip in skips] + [perturb(after[depth])]
            auxiliary.append(self.decoder(f"auxiliary.{k}", seen, self.gates[k]))
        main = self.decoder("main", [*skips, after[-1]], self.gates[-1])
        return [1 / (1 + torch.exp(-logits)) for logits in (main, *auxiliary)]


def f_drop(x):
    share = 0.7 + 0.2 * torch.rand(())
    activity = x.mean(1)
    kept = torch.stack([a < a.max() * share for a in activity])
    return torch.where(kept[:, None], x, torch.zeros_like(x))


def dropout(x):
    return x * torch.nn.functional.dropout(torch.ones_like(x), 0.3)


def f_noise(x):
    u = torch.rand(x.shape[1:], dtype=x.dtype) * 0.6 - 0.3
    return x + x * u[None]


def reference_losses(probabilities, masks, weight, detach):
    n, terms = len(masks), []
    for p in probabilities:
        p = p[:n]
        bce = -(masks * p.log() + (1 - masks) * (1 - p).log()).sum() / masks.numel()
        dice = [1 - (2 * (q * y).sum() + 1e-5) / (q.sum() + y.sum() + 1e-5) for q, y in zip(p, masks, strict=True)]
        terms.append(0.5 * bce + sum(dice) / n)  # Eq. 10
    supervised = sum(terms) / len(probabilities)  # Eq. 9
    main, *auxiliary = (p[n:] for p in probabilities)
    main = main.detach() if detach else main
    consistency = sum(((main - p) ** 2).sum() for p in auxiliary) / (len(auxiliary) * main.numel())  # Eq. 11
    return supervised + weight * consistency, supervised, consistency  # Eq. 12


@pytest.mark.parametrize(
    ("taps", "gates", "perturb", "ramp", "detach"),
    [
        pytest.param((3, 6, 9), (True,) * 4, "all_levels", "released", False, id="paper"),
        pytest.param((1, 2, 3), (False, True, False, True), "bottleneck", "paper_0.1", True, id="switches"),
        pytest.param((1, 2, 3, 4), (False,) * 5, "all_levels", "released", True, id="K=4"),
    ],
)
def test_ten_steps_equal_the_equations_in_float64(taps, gates, perturb, ramp, detach):
    torch.manual_seed(11)
    network = NetworkConfig("mgcc", widths=(3, 4, 5), taps=taps, kernel_size=3, gates=gates, perturb=perturb)
    method = build(MethodConfig("mgcc", ramp, detach), network).double().train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    images = torch.rand(LABELED + UNLABELED, 1, 16, 16, dtype=torch.float64) * 2 - 1
    masks = (images[:LABELED] > 0.3).double()
    batch = SimpleNamespace(images=images, masks=masks, labeled=LABELED)

    for number in range(10):
        step = 3_900 * number
        if ramp == "released":
            weight = 7 * math.exp(-5 * (1 - min(step // 150, 200) / 200) ** 2)
        else:
            weight = 0.1 * math.exp(-5 * (1 - step / TOTAL) ** 2)

        torch.manual_seed(number)
        losses = method(batch, Progress(step, TOTAL, epoch=0.0, seed=0))
        optimizer.zero_grad()
        losses["loss"].backward()
        weights = {name: p.detach().clone().requires_grad_() for name, p in method.network.named_parameters()}
        reference = Reference(weights, taps, gates, perturb == "all_levels", levels=3)
        torch.manual_seed(number)
        expected = reference_losses(reference.probabilities(images), masks, weight, detach)
        gradients = torch.autograd.grad(expected[0], weights.values())

        assert losses["weight"].item() == pytest.approx(weight)
        for name, value in zip(("loss", "supervised", "consistency"), expected, strict=True):
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), (number, name)
        assert losses["consistency"].item() > 0
        largest = max(gradient.abs().max() for gradient in gradients)
        for (name, parameter), gradient in zip(method.network.named_parameters(), gradients, strict=True):
            error = (parameter.grad - gradient).abs().max()
            assert error <= 1e-5 * largest, (number, name, error, largest)
        optimizer.step()
