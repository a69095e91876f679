"""`python -m sdpo_jax.envs` prints every environment (page.py)."""

from sdpo_jax.envs.page import page

if __name__ == "__main__":
  print(page(), end="")
