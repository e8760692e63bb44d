"""Benchmarks under pytest-benchmark: primitives, reading and writing, and what a merge costs before its first byte."""
