"""Toy config of `mgcc_dist.ldm`: 28 images of 16x16, latents of 4x4, four images per step on two ranks."""

CONFIG = """
data: {{phantom: 40, image_size: 16, workers: 1}}
autoencoder:
  channels: [4, 4, 8]
  layers: 1
  latent_channels: 2
  norm_groups: 4
  batch: 2
  loop: {{{loop}, optimizer: {{name: adam, weight_decay: 0.0}}}}
  losses: {{ssim: 0.1, spectral: 0.001, adversarial: {{weight: 0.01, start: 2, channels: 8, layers: 1}}}}
denoiser:
  channels: [8, 8]
  attention: [false, true]
  layers: 1
  norm_groups: 4
  head_channels: 4
  batch: 2
  loop: {{{loop}, optimizer: adamw, ema_decay: 0.9}}
sampling: {{count: {samples}, steps: 4, per_shard: 2, batch: 2}}
quality: {{neighbours: 2}}
"""


def config(steps: int, checkpoint_every: int, samples: int = 8) -> str:
    """Return YAML; `steps` applies to each network."""
    loop = f"steps: {steps}, checkpoint_every: {checkpoint_every}, log_every: 1, learning_rate: 0.001, precision: 'no'"
    return CONFIG.format(loop=loop, samples=samples)
