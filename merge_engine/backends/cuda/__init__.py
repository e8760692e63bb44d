"""The kernels of csrc/cuda: launched for many tensors at once, without torch."""

from merge_engine.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
