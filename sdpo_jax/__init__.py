"""SDPO in JAX: language models that learn from rich feedback on their own attempts (arXiv 2601.20802)."""
