r"""Test-time self-distillation: one hard question, feedback alone, SDPO against sampling.

The reward is binary. Independent sampling is the baseline.

Run:    python -m sdpo_jax.main --mode=discover --config=configs/discover.py:multi_turn \
          --workdir=runs/discover
Other:  python -m sdpo_jax.main --mode=discover --config=configs/discover.py
        python -m sdpo_jax.main --mode=discover --config.model.lora.rank=32 \
          --config=configs/discover.py:task=livecodebench,subset=very_hard
        with "--config.discover.arms=('sdpo','counterfactual','best_of_k')", what the other
        attempts' feedback adds
        with --config.discover.parallel=8, eight questions at a time, each on an eighth of the
        devices; likewise for tinycode
Smoke:  python -m sdpo_jax.main --mode=discover --config=configs/discover.py:local

Setting: that of arXiv 2601.20802, section 5. The teacher reads the feedback alone, as no solution
is known, and its weights follow the policy at 0.01. The divergence is reverse KL over the top 20
with a tail, and advantages are clipped at 5. An update has 16 attempts, and a run stops at its
first success.

  tinycode       three operations, each named by a novel word; those programs which the base model
                 solves with pass@64 < 0.03. The learning rate is 3e-3: on 24 questions of `train`
                 (any difficulty, one seed) 3e-3 and 1e-3 both found 9 within 85 attempts and 19
                 within 256.
  livecodebench  the paper's 19 hard questions of v6 by their index in its 131, or the 9 very hard
                 ones; source and dates are those of coding.py. A row that cannot be used is an
                 error here: leaving it out would shift the indices. An update's 16 rows are made
                 one by one on one device; where N devices hold a question,
                 --config.train.micro_batches must be 16/N or less.

Cost:   tinycode with `:multi_turn`: 28 minutes on two CPU cores that other programs shared (the
        runs themselves: sdpo 412 s, best_of_k 189 s, multi_turn 1,068 s); seconds of it for the
        difficulty. livecodebench has not been run.
Result: tinycode, 20 held-out questions (base pass@64 on average 0.019) x 5 seeds, 256 attempts
        each, 90 % intervals over questions: discovery@256 52.0 % [38.0, 66.0] for sdpo, 9.0 %
        [4.7, 13.3] for best_of_k, 3.0 % [0.0, 7.3] for multi_turn. sdpo reaches best_of_k's 9.0 %
        with 53 [42, 68] attempts instead of 256, and with 650 [518, 979] generated tokens instead
        of 3,478 (3,324 [2,485, 5,382] with those that the teacher read). Its discovery@85 is 11.0
        points [1.3, 21.8] above best_of_k's discovery@256. Every run: results/discover. One seed of
        words, one base model.
"""

import pathlib
import runpy

from sdpo_jax import config
from sdpo_jax.objectives import build

LIVECODEBENCH = {
  "hard": (1, 3, 10, 43, 46, 59, 69, 74, 86, 91, 92, 95, 100, 103, 111, 120, 125, 127, 129),
  "very_hard": (3, 10, 46, 74, 91, 92, 95, 103, 125),
}


def get_config(arg: str = ""):
  """Returns the configuration of a task; `local` keeps its path and makes all sizes toy sizes."""
  a = config.parse_arg(
    arg,
    task="tinycode",
    subset="hard",
    model="",
    level="very_hard",
    seed=0,
    multi_turn=False,
    local=False,
  )
  if a.task == "tinycode":
    config.refuse(a, "subset", because="it chooses questions of livecodebench")
    c = tinycode(a)
  elif a.task == "livecodebench" and a.subset in LIVECODEBENCH:
    config.refuse(a, "level", because="it chooses questions of tinycode")
    if a.local:
      config.refuse(a, "subset", because=config.EXAMPLES)
    c = livecodebench(a)
  else:
    raise ValueError(
      f"task={a.task!r}, subset={a.subset!r} is unknown; choose from "
      f"['tinycode', 'livecodebench'] and {sorted(LIVECODEBENCH)}"
    )
  c.method = build.method_row("sdpo")
  c.method.teacher_context = dict(
    name="feedback_or_solution", use_solution=False, feedback="always"
  )
  c.method.teacher_weights.rate = 0.01
  c.method.token_signal = dict(name="divergence", alpha=1.0, top_k=20, advantage_clip=5.0)
  if a.multi_turn or a.local:
    c.discover.arms = ("sdpo", "best_of_k", "multi_turn")
  if a.local:
    c.discover.update(
      questions=2, indices=(), seeds=1, attempts=16, rollouts=8, candidates=12, calibration=64
    )
    c.rollout.rows = 8
  return c


def tinycode(a):
  """Returns the settings of the embedded task, its questions the hard ones of the base model."""
  c = config.base()
  c.seed = a.seed
  c.model.path = a.model or "tiny"
  c.env.level = a.level
  c.optimizer.update(lr=3e-3, warmup_steps=0, weight_decay=0.0)
  # few shapes: the programs compile once
  c.data.update(length_multiple=64, response_multiple=24)
  c.discover.below_pass_at_64 = 0.03
  if a.local:  # one shape, one device
    c.data.update(max_prompt_tokens=128, max_teacher_tokens=128, length_multiple=128)
    c.mesh.fsdp = 1
  return c


def livecodebench(a):
  """Returns the settings of coding.py for the paper's questions."""
  coding = runpy.run_path(str(pathlib.Path(__file__).parent / "coding.py"))["get_config"]
  c = coding(f"model={a.model or 'qwen3-8b'},seed={a.seed}" + ",local" * a.local)
  c.data.on_bad_row = "error"
  c.train.update(updates_per_batch=1, micro_batches=1 if a.local else 16)
  c.discover.update(split="test", indices=LIVECODEBENCH[a.subset], attempts=2750)
  return c
