r"""Measures a model on questions of mathematics or of code, with several attempts at each.

Run:    python -m sdpo_jax.main --mode=eval --config=configs/small_model.py:task=gsm8k \
          --checkpoint=runs/small_gsm8k --suites=configs/eval/small_model.py:task=gsm8k \
          --workdir=runs/small_gsm8k_eval
The rows are those of the configuration that is named beside it; task= names the suite.
"""

from sdpo_jax import config


def get_suites(arg: str = ""):
  a = config.parse_arg(arg, task="gsm8k", questions=100, samples=8)
  return {
    a.task: {
      "splits": ("test",),
      "questions": a.questions,
      "samples": a.samples,
      "temperature": 0.7,
      "top_p": 1.0,
    }
  }
