"""Measures an agent on tasks of the household, and on templates that training never shows.

Run:  python -m sdpo_jax.main --mode=eval --config=configs/agentic.py --checkpoint=runs/agentic \
        --suites=configs/eval/agentic.py --workdir=runs/agentic_eval
"""

from sdpo_jax import config


def get_suites(arg: str = ""):
  a = config.parse_arg(arg, questions=200, samples=2)
  return {
    "household": {
      "env": {"name": "household"},
      "splits": ("heldout", "unseen"),
      "questions": a.questions,
      "samples": a.samples,
    }
  }
