"""Measurements: `python -m sdpo_jax.bench loss | step | rollout | sandbox`. Results worth keeping: results/*.json."""
