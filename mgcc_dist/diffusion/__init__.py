"""The generative stage (Section III-B): autoencoder, latent denoiser, DDIM sampling; composed by `mgcc_dist.ldm`."""
