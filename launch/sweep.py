r"""Prints the commands of a grid of runs, one a line; it runs nothing.

  python launch/sweep.py [--config=FILE.py] [--workdir=DIR] [--launcher=COMMAND] \
      AXIS ... [-- ARGUMENT ...]

An axis is NAME=VALUE,VALUE,...: `method=sdpo,grpo` and `seed=0,1,2` go into --config, and
`config.optimizer.lr=1e-4,1e-5` changes a setting. What follows `--` is given to every run. Every
run has its own directory under --workdir, named by its values. Examples:

  python launch/sweep.py method=sdpo,grpo seed=0,1,2 | xargs -d '\n' -P 2 -I{} sh -c {}
  python launch/sweep.py method=sdpo,grpo seed=0,1,2 --launcher="launch/slurm.sh --nodes=2 --" | sh
  sbatch --array=1-6 --wrap='eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands.txt)"'

For a grid with one report at the end, on this machine, there is `python -m sdpo_jax.experiment`.
Exit status: 0, or 2 with one line.
"""

import argparse
import itertools
import pathlib
import re
import shlex
import signal
import sys
from typing import NoReturn

DEFAULT_AXES = ["method=sdpo,grpo", "seed=0,1,2"]  # what a bare dry run shows


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_axes(texts: list[str]) -> dict[str, list[str]]:
  """Returns {name: values}; ValueError for an axis without values, or with one of them twice."""
  axes: dict[str, list[str]] = {}
  for text in texts:
    name, equals, joined = text.partition("=")
    values = joined.split(",")
    if not name or not equals or "" in values:
      raise ValueError(f"{text!r} is no axis: NAME=VALUE,VALUE,...")
    if len(set(values)) < len(values) or name in axes:
      raise ValueError(f"{text!r}: a value or an axis is given twice")
    axes[name] = values
  return axes


def run_name(point: dict[str, str]) -> str:
  """Names a run by its values: numbers with the last word of their axis before them."""
  parts = []
  for name, value in point.items():
    word = name.rpartition(".")[2]
    parts.append(value if re.match(r"[A-Za-z]", value) else f"{word}{value}")
  return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def command(options: argparse.Namespace, point: dict[str, str]) -> list[str]:
  """Returns the words of one run's command."""
  settings = {name: value for name, value in point.items() if name.startswith("config.")}
  arguments = [f"{name}={value}" for name, value in point.items() if name not in settings]
  path, _, given = options.config.partition(":")
  config = ":".join(filter(None, [path, ",".join(filter(None, [given, *arguments]))]))
  return [
    *shlex.split(options.launcher),
    f"--config={config}",
    *(f"--{name}={value}" for name, value in settings.items()),
    *options.rest,
    f"--workdir={pathlib.PurePath(options.workdir, run_name(point))}",
  ]


def main(argv: list[str]) -> int:
  own, rest = argv, []
  if "--" in argv:
    own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
  parser = _Parser(
    prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("axes", nargs="*", metavar="AXIS", help="NAME=VALUE,VALUE,...")
  parser.add_argument("--config", default="configs/tinycode.py", help="FILE.py[:key=value,...]")
  parser.add_argument("--workdir", default="runs/sweep", help="the runs' directories go here")
  parser.add_argument(
    "--launcher", default="python -m sdpo_jax.main", help="what the arguments of a run follow"
  )
  parser.add_argument("--dry-run", action="store_true", help="as without it; axes have an example")
  options = parser.parse_intermixed_args(own)
  options.rest = rest
  if not options.axes and options.dry_run:
    options.axes = DEFAULT_AXES
  try:
    axes = parse_axes(options.axes)
    if not axes:
      raise ValueError("no axis is given, such as seed=0,1,2; --help says more")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    names = [run_name(point) for point in points]
    if len(set(names)) < len(names):
      raise ValueError("two runs would have one directory: give axes values that differ")
  except ValueError as error:
    parser.error(str(error))
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
  for point in points:
    print(shlex.join(command(options, point)))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
