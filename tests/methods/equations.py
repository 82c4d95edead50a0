"""Eq. 3 to 12 of the paper and the networks, reimplemented on plain tensors of any dtype for the golden tests."""

import math

import torch
from torch.nn.functional import conv2d, max_pool2d


class Reference:
    """The networks as functions of a dict of tensors `w`; in training mode, or with `running` statistics in `w`."""

    def __init__(self, weights, taps=(), gates=(), perturb_skips=True, levels=3, running=False):
        self.w, self.taps, self.gates, self.perturb_skips, self.levels = weights, taps, gates, perturb_skips, levels
        self.running = running

    def conv(self, name, x, **arguments):
        return conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **arguments)

    def norm(self, name, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        if self.running:
            mean, variance = (self.w[f"{name}.running_{kind}"][:, None, None] for kind in ("mean", "var"))
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

    def encoder(self, images):
        x, features = images.repeat(1, 3, 1, 1), []
        for level in range(self.levels):
            x = self.double_conv(f"encoder.blocks.{level}", max_pool2d(x, 2) if level else x)
            features.append(x)
        return features

    def unet(self, images):
        """Probabilities [B,1,H,W] of the plain U-Net."""
        return sigmoid(self.decoder("decoder", self.encoder(images), gated=False))

    def cct(self, images):
        """Main, auxiliary 1, 2, 3 of the U-Net with auxiliary decoders, each [B,1,H,W]."""
        features = self.encoder(images)
        seen = [features, *([perturb(f) for f in features] for perturb in (f_noise, dropout, f_drop))]
        names = ("main", "auxiliary.0", "auxiliary.1", "auxiliary.2")
        return [sigmoid(self.decoder(name, f, gated=False)) for name, f in zip(names, seen, strict=True)]

    def mgcc(self, images):
        """Main, auxiliary 1, 2, ..., each [B,1,H,W]."""
        *skips, bottleneck = self.encoder(images)
        after = [bottleneck]
        for layer in range(self.taps[-1]):
            after.append(self.mixer_layer(f"mixer.{layer}", after[-1]))
        auxiliary = []
        for k, depth in enumerate((0, *self.taps[:-1])):
            perturb = (f_drop, dropout, f_noise)[k % 3]
            seen = [perturb(skip) if self.perturb_skips else skip for skip in skips] + [perturb(after[depth])]
            auxiliary.append(self.decoder(f"auxiliary.{k}", seen, self.gates[k]))
        main = self.decoder("main", [*skips, after[-1]], self.gates[-1])
        return [sigmoid(logits) for logits in (main, *auxiliary)]

    def mgcc_main(self, images):
        """Only the main decoder of MGCC."""
        *skips, x = self.encoder(images)
        for layer in range(self.taps[-1]):
            x = self.mixer_layer(f"mixer.{layer}", x)
        return sigmoid(self.decoder("main", [*skips, x], self.gates[-1]))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


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


def bce(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum() / y.numel()


def dice(p, y):
    """1 - Dice, the mean over images."""
    return sum(1 - (2 * (a * b).sum() + 1e-5) / (a.sum() + b.sum() + 1e-5) for a, b in zip(p, y, strict=True)) / len(y)


def supervised(p, y):
    return 0.5 * bce(p, y) + dice(p, y)  # Eq. 10


def mse(p, q):
    return ((p - q) ** 2).sum() / p.numel()
