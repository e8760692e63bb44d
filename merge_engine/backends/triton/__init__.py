"""The kernels of merge_engine.kernels: compiled for the GPU that is there, or interpreted."""

from merge_engine.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
