r"""Measures a TinyCode model on every split: pass@1 to pass@16, greedy accuracy, entropy, length.

Run:    python -m sdpo_jax.main --mode=eval --config=configs/tinycode.py --checkpoint=runs/A:240 \
          --suites=configs/eval/tinycode.py --workdir=runs/A
Other:  --suites=configs/eval/tinycode.py:level=hard,samples=64
"""

from sdpo_jax import config


def get_suites(arg: str = ""):
  a = config.parse_arg(arg, level="default", questions=100, samples=16)
  return {
    "tinycode": {
      "env": {"name": "tinycode", "level": a.level},
      "splits": ("heldout", "unseen", "adversarial"),
      "questions": a.questions,
      "samples": a.samples,
      "temperature": 1.0,  # as in training, so that entropy can be estimated
      "top_p": 1.0,
      "greedy": True,
    }
  }
