"""Measures what is worth keeping: `python -m sdpo_jax.bench loss | step | sandbox`.

Results that the project keeps are in results/*.json.
"""
