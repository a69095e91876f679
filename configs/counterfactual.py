r"""Counterfactual self-distillation against SDPO and GRPO, at matched generated tokens.

Run:    python -m sdpo_jax.main --config=configs/counterfactual.py:domain=tinycode,arm=counterfactual --workdir=runs/counterfactual
Grid:   python -m sdpo_jax.experiment --config=configs/experiments/counterfactual.py --workdir=runs/counterfactual_grid --jobs=2
Smoke:  python -m sdpo_jax.main --config=configs/counterfactual.py:local --workdir=runs/counterfactual_smoke
Arms:   sdpo, grpo; sdpo_extra, grpo_extra (larger groups: what counterfactual samples beside its rollouts); counterfactual (two more samples a
        question, judged), counterfactual_imagined (the policy imagines their feedback), counterfactual_siblings (the group's own: nothing
        more is generated). Numbers of steps are such that all arms generate about as many tokens: what an arm generates beside its rollouts it
        pays for with updates.
Notes:  note=full is "If you had tried X instead of Y, you would have received Z". Arithmetic's tiny model has read such notes before (configs/pretrain_tiny.py,
        start=): of 203 failed attempts at held-out questions with two failed alternatives the untrained teacher, greedy, solves 68.0 % given feedback
        alone and 73.4 % with both notes; of 129 67.4 % given feedback alone, 73.6 % with both, 76.7 % with Z alone, and 48.8 % with notes whose feedback the
        policy imagined (45 % of it wrong, 17 % in its verdict), which mislead. TinyCode's, tiny_notes, has read them too, but
        copies lists badly and makes nothing of them: of 140 failed attempts 35.7 % given feedback alone, 35.0 % with both notes, 32.1 % with Z alone (note=feedback), 23.6 % with imagined ones
        (of which 99.7 % wrong, 20 % in the verdict). What a verified success shows, a solution, it reads well.
Data:   domain=tinycode and arithmetic make their own questions, for the tiny models of the package; coding and math_qa are those of configs/coding.py
        (livecodebench) and configs/math_qa.py (GSM8K) and their models.
Cost:   TinyCode: 170 s (sdpo_extra) to 460 s (sdpo) on one core with as much other work, 675 to 1,123 s (counterfactual, siblings) in the worst hour: most of it is
        compilation, of which JAX_COMPILATION_CACHE_DIR spares the shapes that an earlier run has used. Arithmetic: 91 s (grpo) to 253 s
        (counterfactual_imagined), likewise; the last runs, beside a test run, up to 431 s. Coding and maths have not been measured.
Result: TinyCode, avg@4 over 100 questions each, at 45 to 46 thousand generated tokens (imagined 49 to 51): mean (lowest to highest). Base model 41.0 % held-out,
        24.5 % unseen, 33.3 % adversarial. Some runs decoded with the cache's axes in another order (the same mathematics). Intervals of one run over its questions are about 9 points to either side. Last: thousands of tokens until
        60 % held-out, between evaluations, for each seed. The third seed is not complete.
                              seeds  held-out               unseen                 adversarial            60 % after
        sdpo                      3  66.1 (65.0 to 66.8)    45.8 (44.2 to 46.8)    60.2 (56.2 to 63.0)    23 28 30
        counterfactual_siblings   2  64.4 (61.5 to 67.2)    47.6 (46.5 to 48.8)    58.0 (57.0 to 59.0)    26 33
        counterfactual            3  63.8 (63.0 to 65.2)    44.2 (42.0 to 47.0)    55.5 (52.8 to 58.0)    29 31 36
        sdpo_extra                2  59.5 (58.5 to 60.5)    33.4 (32.5 to 34.2)    53.2 (52.5 to 54.0)    43 never
        counterfactual_imagined   2  52.6 (52.0 to 53.2)    30.9 (30.8 to 31.0)    47.8 (46.8 to 48.8)    never in any
        grpo_extra                1  50.7                   30.0                   46.5                   never
        grpo                      2  47.0 (46.8 to 47.2)    30.4 (29.8 to 31.0)    44.6 (43.8 to 45.5)    never in any
        No gain over plain SDPO: counterfactual ends 0.2 points ahead of it held-out, 3.5 and 3.5 behind (seed by seed), 0.5 ahead, 3.2 and 2.2 behind on unseen
        compositions, and takes 1.1 to 1.3 times the tokens to 60 %; siblings' notes end 2.2 ahead and 5.0 behind, and take 1.1 to 1.2 times. At the same extra samples
        it does better than sdpo_extra in both seeds: 4.8 and 4.5 points held-out, 12.8 and 11.0 unseen (with 62 updates against 53).
        Imagined feedback was wrong in 98 to 99 % of the cases, its verdict in 23 to 25 %, and costs more tokens than any other part.
        Arithmetic, three seeds, at 110 to 115 thousand generated tokens; base model 27.5 %, 38.8 %, 23.3 %. Last: thousands of
        tokens until 80 % held-out, between evaluations, for each seed.
                              seeds  held-out               unseen                 adversarial            80 % after
        sdpo                      3  93.1 (89.5 to 95.0)    87.9 (87.0 to 89.2)    87.2 (80.8 to 90.5)    51 50 45
        counterfactual_siblings   3  91.8 (91.5 to 92.2)    87.6 (84.2 to 89.8)    82.8 (80.5 to 84.8)    60 51 52
        counterfactual            3  90.8 (89.8 to 92.2)    85.9 (85.0 to 86.5)    84.2 (78.8 to 87.2)    64 66 71
        counterfactual_imagined   3  86.9 (78.8 to 92.8)    81.8 (76.8 to 85.5)    79.3 (70.8 to 84.0)    82 never 63
        sdpo_extra                3  80.9 (75.8 to 90.8)    79.2 (76.0 to 82.5)    79.2 (76.2 to 83.0)    71 never never
        grpo_extra                3  31.4 (29.0 to 34.2)    41.6 (37.0 to 45.0)    32.2 (27.5 to 37.2)    never in any
        grpo                      3  30.7 (27.3 to 36.8)    41.6 (38.8 to 44.0)    31.0 (27.3 to 35.8)    never in any
        No gain over plain SDPO here either: counterfactual ends 5.2 and 4.5 points behind it held-out and 2.8 ahead (seed by seed), 1 to 3 behind on unseen
        compositions in every seed, and takes 1.3 to 1.6 times the tokens to 80 %; siblings' notes, which are free, end 2.8 and 3.2 behind and 2.0 ahead, and
        take up to 1.2 times. At the same extra samples it does better than sdpo_extra: -1.0, 14.5 and 16.0 points held-out, 4 to 10 unseen (with 94
        updates against 80: where few fail, few alternatives are drawn). Imagined feedback was wrong in 67 to 76 % of the cases, its verdict in 33 to 34 %
        (means over steps). GRPO finds no footing. The share of tokens beside the rollouts was set from a run of seed 0. Every run:
        experiments/results/counterfactual/curves.json.
"""

import os

from sdpo_jax import config
from sdpo_jax.objectives.teacher_context import FEEDBACK

TINY = {"tinycode": "tiny_notes", "arithmetic": "tiny_arithmetic"}
PAPER = {"coding": "hub:livecodebench/code_generation_lite/test6.jsonl", "math_qa": "hub:openai/gsm8k:main"}
EXTRA = 2     # samples that counterfactual may draw beside each of SDPO's groups
ARMS = {  # method, changes to its counterfactual part
    "sdpo": ("sdpo", {}),
    "sdpo_extra": ("sdpo", {}),
    "counterfactual": ("counterfactual", dict(alternatives=EXTRA)),
    "counterfactual_imagined": ("counterfactual", dict(alternatives=EXTRA, feedback="imagined", imagined_tokens=128)),
    "counterfactual_siblings": ("counterfactual", dict(sources=("siblings",))),
    "grpo": ("grpo", {}),
    "grpo_extra": ("grpo", {}),
}
MEASURED = {  # tokens generated for one of a rollout, as it was with seed 0: the fewer attempts fail, the fewer alternatives are drawn; a verdict may be longer than an answer
    "tinycode": {"counterfactual": 1.30, "counterfactual_imagined": 2.45},
    "arithmetic": {"counterfactual": 1.28, "counterfactual_imagined": 1.46},
}


def get_config(arg: str = ""):
  a = config.parse_arg(arg, domain="tinycode", arm="counterfactual", model="", data="", top_k=0, steps=0, note="full", seed=0, local=False)
  for name, value, choices in (("domain", a.domain, [*TINY, *PAPER]), ("arm", a.arm, list(ARMS)), ("note", a.note, ["feedback", "full"])):
    if value not in choices:
      raise ValueError(f"{name}={value!r} is unknown; choose from {choices}")
  a.method, changes = ARMS[a.arm]
  if a.domain in TINY:
    config.refuse(a, "data", "top_k", because=f"domain={a.domain} makes its own questions and compares whole vocabularies")
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
    c.optimizer.decay_steps = max(c.total_steps, 20)   # past the warm-up
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
  c.data.max_teacher_tokens = 700   # with two notes
  if not a.local:
    c.total_steps, c.eval.every_steps = 80 if a.domain == "tinycode" else 120, 10
  return c


def paper(a):
  a.model, rich = a.model or "qwen3-8b", a.domain == "coding"
  a.top_k = a.top_k or (20 if rich else 100)
  c = config.paper(a, rich_feedback=rich)
  c.env = dict(name=a.domain, **(dict(first_date="2025-02-01", last_date="2025-05-01") if rich else dict(tell_correctness=True)))
  c.data.sources = (a.data or (os.path.join(config.ROWS, f"{a.domain}.{{split}}.jsonl") if a.local else PAPER[a.domain]),)
  c.data.on_bad_row = "error" if a.local or not rich else "skip"
  if rich and not a.local:
    c.sandbox.workers, c.rollout.judge_threads, c.rollout.judge_timeout_s = 16, 16, 300.0
  if rich and a.local:
    if not a.data:
      del c.env["first_date"], c.env["last_date"]
    c.sandbox.workers, c.rollout.judge_threads = 1, 2
  return c
