"""python -m sdpo_jax.bench NAME [options]: run the measurement of that name; options are its own (--help)."""

import importlib
import sys

NAMES = ("loss", "step", "sandbox")


def main(argv):
  if not argv or argv[0] not in NAMES:
    print(
      f"usage: python -m sdpo_jax.bench {{{','.join(NAMES)}}} [options]; unknown measurement: {argv[0] if argv else '(none)'}",
      file=sys.stderr,
    )
    return 2
  return importlib.import_module(f"sdpo_jax.bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
