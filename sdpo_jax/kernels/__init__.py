"""Fused kernels: each has a plain reference, fast versions, and a function that chooses."""
