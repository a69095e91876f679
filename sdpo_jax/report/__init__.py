r"""One HTML page from work directories: learning curves, results with intervals, rollouts.

  python -m sdpo_jax.report WORKDIR [WORKDIR ...] [--out=DIR] [--find=TEXT]

The command writes DIR/index.html and the curves as PNG files beside it. DIR is WORKDIR/report by
default, or report/ for several work directories. The page carries all that it shows, so it can be
sent as one file. It needs no accelerator, no jax and no network, and works while a run goes on.
The page leaves out what is missing and says so. With --find it carries the rollouts that hold a
text, in place of a sample spread over the run.

  runs         reads work directories and names the runs
  rollouts     reads rollout files: all, a sample, or those that hold a text
  curves       draws metrics: by steps, responses, tokens and seconds
  comparison   tables of results, and differences of groups over paired seeds
  forest       forest plots of these differences, and of gains over the base model
  cards        a rollout as a card: tokens painted by the teacher's gap, turns of an episode
  answers      answers of the base model and of the last evaluation, side by side
  diagnosis    the verdict of --mode=diagnose, where it was asked
  system       machine, times, warnings, settings
  page         puts it all together; its HTML is assets/report.html
"""

from sdpo_jax.report.cards import card, embedded, legend
from sdpo_jax.report.curves import COLOURS, draw_curves
from sdpo_jax.report.page import write_report
from sdpo_jax.report.rollouts import read_rollouts
from sdpo_jax.report.runs import flattened, read_run, read_runs
from sdpo_jax.report.templates import template

__all__ = [
  "COLOURS",
  "card",
  "draw_curves",
  "embedded",
  "flattened",
  "legend",
  "read_rollouts",
  "read_run",
  "read_runs",
  "template",
  "write_report",
]
