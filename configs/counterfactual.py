r"""Counterfactual self-distillation against SDPO and GRPO, at matched generated tokens.

Run:    python -m sdpo_jax.main --config=configs/counterfactual.py:domain=tinycode,arm=counterfactual --workdir=runs/counterfactual
Grid:   python -m sdpo_jax.experiment --config=configs/experiments/counterfactual.py --workdir=runs/counterfactual_grid --jobs=2
Smoke:  python -m sdpo_jax.main --config=configs/counterfactual.py:local --workdir=runs/counterfactual_smoke
Arms:   sdpo, grpo; sdpo_extra, grpo_extra (larger groups, by as many samples as counterfactual may draw at most); counterfactual (two more samples a
        question with a failed attempt, judged), counterfactual_imagined (the policy imagines their feedback), counterfactual_siblings (the group's own: nothing
        more is generated). Numbers of steps are such that all arms generate about as many tokens: what an arm generates beside its rollouts it
        pays for with updates.
Notes:  note=full is "If you had tried X instead of Y, you would have received Z". Arithmetic's tiny model has read such notes before (configs/pretrain_tiny.py,
        start=): of 83 failed attempts at held-out questions with two failed alternatives the untrained teacher, greedy, solves 63.9 % given feedback
        alone, 69.9 % with both notes, 71.1 % with Z alone (note=feedback) and 43.4 % with notes whose feedback the policy imagined (45 % of it wrong, 17 % in its
        verdict), which mislead. TinyCode's, tiny_notes, has read them too, but copies lists badly and makes nothing of them: of 93 failed attempts 34.4 % given
        feedback alone, with both notes and with Z alone, 23.7 % with imagined ones (of which 99.6 % wrong, 19 % in the verdict). What a verified success shows, a
        solution, it reads well. (`pytest -m slow -s tests/test_assets.py`; intervals are about 10 points to either side.)
Data:   domain=tinycode and arithmetic make their own questions, for the tiny models of the package; coding and math_qa are those of configs/coding.py
        (livecodebench) and configs/math_qa.py (GSM8K) and their models.
Cost:   TinyCode: 163 s (sdpo_extra) to 318 s (siblings) a run on one core of its own or with as much other work, up to 1,123 s in the worst hour: most of it is
        compilation, of which JAX_COMPILATION_CACHE_DIR spares the shapes that an earlier run has used. Arithmetic: 91 s (grpo) to 253 s
        (counterfactual_imagined), likewise; the last runs, beside a test run, up to 431 s. Coding and maths have not been measured.
Result: No arm is shown to beat plain SDPO, in either domain. avg@4 over 100 questions a split, three seeds; in brackets 95 % intervals over the seeds (three are few: wide).
        Intervals of one run over its questions are about 9 points to either side. Last: thousands of generated tokens until the arm is, held-out, as good
        as SDPO's last evaluation of the same seed (of as many as it generates), between evaluations. Every run: results/counterfactual/curves.json.
        TinyCode, 45 to 46 thousand generated tokens (imagined 49 to 51); base model 41.0 %, 24.5 %, 33.3 %. Some runs decoded with the cache's axes in another
        order (the same mathematics).
                                held-out             unseen               adversarial          as good as SDPO after
        sdpo                    66.1 [63.2, 67.9]    45.8 [41.6, 48.3]    60.2 [49.6, 67.8]    46 36 34
        counterfactual_siblings 65.2 [55.2, 70.6]    47.2 [45.2, 51.3]    57.6 [55.3, 61.4]    33 never 40
        counterfactual          63.8 [61.6, 67.6]    44.2 [38.3, 51.8]    55.5 [48.1, 62.2]    37 never never
        sdpo_extra              59.6 [56.7, 62.0]    36.0 [26.6, 50.1]    53.8 [50.4, 56.4]    never in any
        counterfactual_imagined 52.6 [51.0, 54.4]    30.7 [29.5, 31.6]    47.4 [45.6, 51.0]    never in any
        grpo_extra              49.0 [43.6, 53.7]    31.9 [26.8, 35.5]    46.8 [33.3, 60.9]    never in any
        grpo                    47.4 [45.6, 49.7]    29.2 [23.2, 34.0]    44.3 [42.8, 47.5]    never in any
        Minus SDPO of the same seed, held-out: siblings 2.2, -5.0, 0.2, counterfactual 0.2, -3.5, -3.5; unseen: siblings 2.2, -0.2, 2.2 (1.4 [-3.1, 3.7]),
        counterfactual 0.5, -3.2, -2.2. counterfactual minus sdpo_extra: held-out 4.2 [2.2, 5.6], unseen 8.2 [-11.8, 20.5], adversarial 1.7 [-6.3, 5.8]; but it draws
        fewer samples beside its rollouts, since only failed attempts want any (1.3 for one, not 1.5), and so has 62 updates against 53.
        Imagined feedback was wrong in 98 to 99 % of the cases, its verdict in 23 to 28 % (means over steps), and costs more tokens than any other part.
        Arithmetic, 110 to 115 thousand generated tokens; base model 27.5 %, 38.8 %, 23.3 %.
        sdpo                    93.1 [83.4, 98.2]    87.9 [85.5, 91.5]    87.2 [69.9, 96.1]    103 103 57
        counterfactual_siblings 91.8 [91.1, 93.1]    87.6 [78.6, 93.4]    82.8 [76.7, 88.1]    never never 58
        counterfactual          90.7 [88.1, 94.8]    85.9 [83.5, 87.5]    84.2 [69.6, 92.5]    never never 75
        counterfactual_imagined 86.9 [65.0, 100]     81.8 [68.3, 91.8]    79.3 [56.3, 91.9]    never never 94
        sdpo_extra              80.9 [67.0, 100]     79.2 [70.5, 88.0]    79.2 [71.2, 89.3]    never in any
        grpo_extra              31.4 [24.9, 39.0]    41.6 [29.3, 50.8]    32.2 [19.5, 45.7]    never in any
        grpo                    30.7 [21.5, 47.0]    41.6 [34.0, 48.1]    31.0 [20.9, 43.8]    never in any
        Minus SDPO, held-out: siblings -2.8, -3.2, 2.0, counterfactual -5.2, -4.5, 2.8; unseen: siblings -5.0, 2.8, 1.2, counterfactual -2.8, -2.0, -1.2. counterfactual
        minus sdpo_extra: held-out -1.0, 14.5, 16.0 (9.8 [-19.3, 26.4]), unseen 4.0, 5.8, 10.2, adversarial -4.2, 10.2, 8.8, with 94 updates against 80.
        Imagined feedback was wrong in 67 to 76 % of the cases, its verdict in 33 to 34 %. GRPO finds no footing. The share of tokens beside the
        rollouts was set from a run of seed 0.
"""

import os

from sdpo_jax import config
from sdpo_jax.objectives.teacher_context import FEEDBACK

TINY = {"tinycode": "tiny_notes", "arithmetic": "tiny_arithmetic"}
PAPER = {
  "coding": "hub:livecodebench/code_generation_lite/test6.jsonl",
  "math_qa": "hub:openai/gsm8k:main",
}
EXTRA = 2  # samples that counterfactual may draw beside each of SDPO's groups
ARMS = {  # method, changes to its counterfactual part
  "sdpo": ("sdpo", {}),
  "sdpo_extra": ("sdpo", {}),
  "counterfactual": ("counterfactual", dict(alternatives=EXTRA)),
  "counterfactual_imagined": (
    "counterfactual",
    dict(alternatives=EXTRA, feedback="imagined", imagined_tokens=128),
  ),
  "counterfactual_siblings": ("counterfactual", dict(sources=("siblings",))),
  "grpo": ("grpo", {}),
  "grpo_extra": ("grpo", {}),
}
# tokens generated for one of a rollout, as it was with seed 0: the fewer attempts fail, the fewer
# alternatives are drawn; a verdict may be longer than an answer
MEASURED = {
  "tinycode": {"counterfactual": 1.30, "counterfactual_imagined": 2.45},
  "arithmetic": {"counterfactual": 1.28, "counterfactual_imagined": 1.46},
}


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    domain="tinycode",
    arm="counterfactual",
    model="",
    data="",
    top_k=0,
    steps=0,
    note="full",
    seed=0,
    local=False,
  )
  for name, value, choices in (
    ("domain", a.domain, [*TINY, *PAPER]),
    ("arm", a.arm, list(ARMS)),
    ("note", a.note, ["feedback", "full"]),
  ):
    if value not in choices:
      raise ValueError(f"{name}={value!r} is unknown; choose from {choices}")
  a.method, changes = ARMS[a.arm]
  if a.domain in TINY:
    config.refuse(
      a,
      "data",
      "top_k",
      because=f"domain={a.domain} makes its own questions and compares whole vocabularies",
    )
  if a.method != "counterfactual":
    config.refuse(a, "note", because=f"arm={a.arm} tells nothing of alternatives")
  if a.local:
    config.refuse(a, "steps", because="local takes two")
  c = tiny(a) if a.domain in TINY else paper(a)
  c.label = a.arm
  if a.method == "counterfactual" and a.note == "feedback":
    c.method.teacher_context.templates.note = FEEDBACK + "{feedback}"
  c.method.counterfactual.update(changes)
  if not a.local:
    c.total_steps = round((a.steps or c.total_steps) / generated(a, c.rollout.max_new_tokens))
    if a.arm.endswith("_extra"):
      larger_groups(a, c)
  if c.optimizer.decay_steps:
    c.optimizer.decay_steps = max(c.total_steps, 20)  # past the warm-up
  return c


def beside(a) -> float:
  """The most samples beside the rollouts for each of them: EXTRA to an SDPO group of 4 (config.tiny) or 8 (config.paper)."""
  return EXTRA / (4 if a.domain in TINY else 8)


def generated(a, max_new_tokens: int) -> float:
  """Tokens for each token of a rollout: measured, or, where nothing was, the most that it can be."""
  if a.arm in ("sdpo", "grpo", "counterfactual_siblings"):
    return 1.0
  verdicts = ARMS[a.arm][1].get("imagined_tokens", 0) / max_new_tokens
  return MEASURED.get(a.domain, {}).get(a.arm, 1.0 + beside(a) * (1.0 + verdicts))


def larger_groups(a, c):
  """As many more a step as counterfactual may draw at most; where a batch goes through the model in parts, these stay as large as they were."""
  before, c.rollout.group = c.rollout.group, round(c.rollout.group * (1.0 + beside(a)))
  parts = "micro_batches" if c.train.micro_batches > 1 else "updates_per_batch"
  if c.train[parts] > 1:
    c.train[parts] = c.train[parts] * c.rollout.group // before


def tiny(a):
  """The settings of configs/tinycode.py; by the number of steps plain SDPO no longer learns much."""
  a.model = a.model or TINY[a.domain]
  c = config.tiny(a)
  c.env.name = a.domain
  c.data.max_teacher_tokens = 700  # with two notes
  if not a.local:
    c.total_steps, c.eval.every_steps = 80 if a.domain == "tinycode" else 120, 10
  return c


def paper(a):
  a.model, rich = a.model or "qwen3-8b", a.domain == "coding"
  a.top_k = a.top_k or (20 if rich else 100)
  c = config.paper(a, rich_feedback=rich)
  c.env = dict(
    name=a.domain,
    **(
      dict(first_date="2025-02-01", last_date="2025-05-01") if rich else dict(tell_correctness=True)
    ),
  )
  c.data.sources = (
    a.data
    or (os.path.join(config.ROWS, f"{a.domain}.{{split}}.jsonl") if a.local else PAPER[a.domain]),
  )
  c.data.on_bad_row = "error" if a.local or not rich else "skip"
  if rich and not a.local:
    c.sandbox.workers, c.rollout.judge_threads, c.rollout.judge_timeout_s = 16, 16, 300.0
  if rich and a.local:
    if not a.data:
      del c.env["first_date"], c.env["last_date"]
    c.sandbox.workers, c.rollout.judge_threads = 1, 2
  return c
