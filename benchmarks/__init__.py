"""Benchmarks under pytest-benchmark: primitives, reading and writing, and the time of a merge before its first byte."""
