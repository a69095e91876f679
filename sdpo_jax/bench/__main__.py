"""Runs the measurement of a name: python -m sdpo_jax.bench NAME [options].

Options are the measurement's own (--help).
"""

import importlib
import sys

NAMES = ("loss", "step", "rollout", "episodes", "sandbox")


def main(argv):
  """Returns the exit status of the measurement, or 2 for a name that there is not."""
  name = argv[0] if argv else "(none)"
  if name in ("-h", "--help"):
    print(f"usage: python -m sdpo_jax.bench {{{','.join(NAMES)}}} [options]; NAME --help has these")
    return 0
  if name not in NAMES:
    print(
      f"usage: python -m sdpo_jax.bench {{{','.join(NAMES)}}} [options]; "
      f"unknown measurement: {name}",
      file=sys.stderr,
    )
    return 2
  return importlib.import_module(f"sdpo_jax.bench.{name}").main(argv[1:]) or 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
