"""Environments ask questions, judge responses and explain the judgement; none imports jax."""
