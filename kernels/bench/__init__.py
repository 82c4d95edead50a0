"""The benchmark of the fused kernels: `python -m mgcc_dist.kernels.bench`, described in __main__.py.

Unlike the rest of kernels/, it imports the network's own modules. It needs torch, Triton on a GPU, and matplotlib for a
plot.
"""
