"""Latent diffusion (Section III-B): autoencoder, denoiser and sampling. `mgcc ldm` runs them in order."""
