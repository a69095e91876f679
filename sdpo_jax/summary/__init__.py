r"""Writes RESULTS.md from the measurements that are committed under results/.

  python -m sdpo_jax.experiment --summary

A folder results/NAME/ may hold
  curves.json      every evaluation of every run of a grid, as sdpo_jax.experiment writes it
  scores.json      what the last checkpoints can do (final_scores.py), likewise
  tuning.json      the trials that chose the grid's settings, likewise
  discover.json    the summary of a session of --mode=discover
  diagnosis_*.json what --mode=diagnose said of a task; its runs are those of curves.json that are
                   called ARM_on_TASK, else those of results/TASK
  oracle_*.json    what --mode=diagnose wrote (its index.json), for the right next tokens alone
  notes.md         facts that the committed data does not hold, in prose
  *.png            plots

Its section begins with what configs/experiments/NAME.py, else configs/NAME.py, states in its
docstring: what is compared, the command (`Run:`) and the cost (`Cost:`). Every number of a table is
computed here. Scores are avg@k, in per cent; intervals are those of stats.py. The section of
results/bench has the tables of sdpo_jax/bench/results instead.

Errors: FileNotFoundError where there is no folder results/.

The files here:
  page        puts it together, a section for each folder
  runs        reads runs; grids, pace, collapse, forgetting and finals make tables of them
  claims      holds what papers claim against these, by the rules of evidence
  diagnoses, oracle, discovery, benchmarks
              make the tables of the other files
  description reads the docstring of an experiment's file
  markdown    formats numbers and tables
"""

from sdpo_jax.summary.grids import tuning_words
from sdpo_jax.summary.page import text, write

__all__ = ["text", "tuning_words", "write"]
