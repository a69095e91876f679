"""Environments: they ask, run and judge. Nothing here imports jax."""
