"""Writes the report of work directories.

  python -m sdpo_jax.report WORKDIR [WORKDIR ...] [--out=DIR] [--find=TEXT]

It prints the path of the page. Exit status: 0; 2 for a work directory that does not exist, or a
page that cannot be written, which one line says.
"""

import argparse
import pathlib
import sys

from sdpo_jax.errors import local_path
from sdpo_jax.report.page import write_report
from sdpo_jax.report.rollouts import FOUND


def main(argv=None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.report", description="Work directories -> one HTML page."
  )
  parser.add_argument("workdir", nargs="+", type=local_path)
  parser.add_argument(
    "--out",
    type=local_path,
    help="directory of the page; default WORKDIR/report, or report/ for several",
  )
  parser.add_argument(
    "--find",
    default="",
    metavar="TEXT",
    help=f"carry the first {FOUND} rollouts that hold this text, whatever its case",
  )
  flags = parser.parse_args(argv)
  default = pathlib.Path(flags.workdir[0]) / "report" if len(flags.workdir) == 1 else "report"
  try:
    print(write_report(flags.workdir, flags.out or default, find=flags.find))
  except OSError as error:
    print(f"sdpo_jax.report: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
