"""Latent diffusion (Section III-B): autoencoder, denoiser and sampling. `mgcc_dist.ldm` runs them in order."""
