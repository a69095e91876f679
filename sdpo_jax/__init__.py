"""SDPO in JAX: language models learn from rich feedback on their attempts (arXiv 2601.20802)."""
