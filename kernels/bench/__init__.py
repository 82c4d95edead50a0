"""The benchmark of the fused forms: `python -m mgcc_dist.kernels.bench`, described in __main__.py.

It is a program, and so unlike the rest of kernels/ it knows the network's own modules; it needs torch (and Triton)
alone, and matplotlib for a picture.
"""
