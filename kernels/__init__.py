"""Attention over intervals: one data structure, and for each operation a reference, a CPU and a Triton implementation."""
