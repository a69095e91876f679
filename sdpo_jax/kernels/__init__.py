"""Fused kernels, each with a plain reference and a function that chooses."""
