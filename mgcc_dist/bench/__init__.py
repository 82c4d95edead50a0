"""The benchmark of the fused kernels: `mgcc bench`, described in __main__.py.

It iterates over the operations of `kernels.operation`. It needs Triton on a GPU, and matplotlib for a plot.
"""
