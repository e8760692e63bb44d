"""The CUDA kernels on a CPU, for tests (see cuda_runtime.h here)."""
