"""The primitives of a merge as Triton kernels, imported as ``merge_engine.kernels``.

One file per primitive: the formula, the kernel, and the function that launches it on tensors. They compute what
docs/arithmetic.md says, to the byte, compiled for a GPU as well as in Triton's interpreter (TRITON_INTERPRET=1).
``merge_engine.backends.triton`` calls them.
"""
