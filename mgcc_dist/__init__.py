"""mgcc-dist: the MGCC method (arXiv 2305.09447) for ultrasound segmentation, from latent diffusion to masks."""

__version__ = "0.1.0"
