"""The native code of csrc/cpu: vector instructions, all cores, no torch."""

from merge_engine.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
