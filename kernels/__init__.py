"""Triton kernels, imported as ``merge_engine.kernels``.

None are here yet: the CPU backend in ``csrc/cpu`` and the torch reference come first, and define the bytes
that kernels for GPUs must reproduce.
"""
