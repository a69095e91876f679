r"""Trains a model that acts in a world, turn by turn.

Run:    python -m sdpo_jax.main --config=configs/agentic.py --workdir=runs/agentic
Other:  python -m sdpo_jax.main --config=configs/agentic.py:method=grpo,seed=1 --workdir=runs/grpo
        python -m sdpo_jax.main --config=configs/agentic.py:world=search_qa,model=qwen3-1.7b \
          --workdir=runs/search
Smoke:  python -m sdpo_jax.main --config=configs/agentic.py:local --workdir=runs/agentic_smoke
Worlds: household  the project's own, in ALFWorld's wording, for the tiny model
        search_qa  questions that are answered by searching (extra `search`)
        webshop    a small shop with WebShop's pages (extra `webshop`)
        alfworld   ALFWorld's engine, with games of our own or $ALFWORLD_DATA (extra `textworld`)
Shown:  context=skill, the default, gives SDPO's teacher what is known of the world in the place of
        feedback and solutions; context=row keeps what the row of the method says.
Rows:   rows=episodes, the default of the household, trains an episode as one text; rows=turns, that
        of the others, each turn after a prompt of its own, which shows the last turns alone.
Scale:  worlds with a model of real size have the settings of CRAFT (arXiv 2606.29476): groups of 8,
        16 tasks a step (search_qa: 128), learning rate 1e-6, 150 steps; rows are turns, whose
        prompts show 2 turns (search_qa: 4). Its updates take 256 turns each (webshop: 64): ours,
        16 a step, take as many episodes as have about so many. The prompt's tokens are divided
        between the first messages and the turns that are shown. Print what they need with
        python -m sdpo_jax.main --mode=plan --topology=v5p:2x2x2 \
          --config=configs/agentic.py:world=webshop,model=qwen3-1.7b
Cost:   not measured.
Result: not measured.
"""

from sdpo_jax import config
from sdpo_jax.objectives import build

# What gives way to the skill. Other rows are about what their teacher reads.
_SDPOS = ("feedback_or_solution", "reference_solution")
_TURN = 512  # tokens
# world: tasks a step, turns, those a prompt shows, tokens of a prompt, of an episode in one text
_REAL = {
  "alfworld": (16, 50, 2, 2048, 14_000),
  "webshop": (16, 15, 2, 4096, 12_000),
  "search_qa": (128, 4, 4, 4096, 4096),
}
_FIRST = 1024  # tokens of a prompt that are for the first messages, where it shows turns
_SPLITS = {"alfworld": ("heldout", "unseen"), "webshop": ("eval", "test")}


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg, method="sdpo", world="household", model="", context="skill", rows="", seed=0, local=False
  )
  worlds = ("household", *_REAL)
  if a.world not in worlds:
    raise ValueError(f"world={a.world!r} is unknown; choose from {list(worlds)}")
  if a.context not in ("skill", "row"):
    raise ValueError(f"context={a.context!r} is unknown; choose from ['skill', 'row']")
  rows = a.rows or ("episodes" if a.world == "household" else "turns")
  if rows not in ("episodes", "turns"):
    raise ValueError(f"rows={a.rows!r} is unknown; choose from ['episodes', 'turns']")
  c = config.base()
  c.seed = a.seed
  c.method = build.method_row(a.method)
  has_notes = c.method.counterfactual.name != "none"  # which episodes refuse
  if a.context == "skill" and c.method.teacher_context.name in _SDPOS and not has_notes:
    c.method.teacher_context = build.complete_part("teacher_context", "skill")
  c.env = dict(name=a.world)
  c.rollout.rows_are = rows
  if a.world == "household":
    _household(c)
  else:
    _of_real_size(c, a.world)
  c.model.path = a.model or c.model.path
  if c.method.reduction.name == "constant":
    c.method.reduction.length = float(config.sampled_tokens(c))
  if c.method.memory.name != "none":
    c.data.questions = 512
  if a.local:
    _toy_sizes(c)
  return c


def _household(c) -> None:
  """Sets what the tiny model learns with in minutes."""
  c.model.path = "tiny_household"
  c.total_steps = 150
  c.data.update(max_prompt_tokens=96, max_teacher_tokens=160, length_multiple=64)
  # a CPU compiles for 15 s and more what takes a second: padding is cheaper
  c.data.update(response_multiple=16, room=0.5, compilation_steps=50.0)
  c.rollout.update(questions=8, group=8, max_new_tokens=8, max_episode_tokens=192, rows=64)
  c.optimizer.update(lr=5e-4, warmup_steps=5)
  if c.method.teacher_weights.name == "ema":
    c.method.teacher_weights.rate = 0.02
  if c.method.teacher_context.name == "hindsight":  # the tiny model reads other words by letter
    c.method.teacher_context.update(hint_tokens=32, reflecting="{prompt}{attempt}{outcome}\nJSON: ")
  c.eval.update(
    every_steps=50,
    questions=100,
    samples=2,
    splits=("heldout",),
    final_splits=("heldout", "unseen"),
  )
  c.checkpoint.every_steps = 50


def _of_real_size(c, world: str) -> None:
  """Sets what the paper trains with."""
  tasks, turns, history, prompt, episode = _REAL[world]
  c.model.update(path="qwen3-1.7b", dtype="bfloat16", remat="block")
  c.total_steps = 150
  c.env.limit = turns
  c.rollout.update(questions=tasks, group=8, max_new_tokens=_TURN, rows=128)
  if c.rollout.rows_are == "turns":
    first, episode = _FIRST, prompt - _FIRST + _TURN
    c.rollout.history = history
    c.train.updates_per_batch = 16
  else:
    first = prompt
    c.train.micro_batches = 8
    if world == "alfworld":
      c.env.shows_commands = False  # an episode is one text
  c.rollout.max_episode_tokens = episode
  # a skill of 900 words, and what stands around it
  c.data.update(max_prompt_tokens=first, max_teacher_tokens=first + 1536, length_multiple=512)
  updates = c.total_steps * c.train.updates_per_batch
  c.optimizer.update(lr=1e-6, warmup_steps=updates // 10 if world == "search_qa" else 0)
  c.rollout.judge_threads = 32  # worlds that are at work at a time
  heldout, *others = _SPLITS.get(world, ("heldout", "unseen"))
  c.eval.update(
    every_steps=25, questions=128, samples=1, temperature=0.4, top_p=1.0,
    splits=(heldout,), final_splits=(heldout, *others),
  )  # fmt: skip
  if c.method.reference_kl.name != "none" and world == "search_qa":
    if c.method.reference_kl.coefficient is not None:
      c.method.reference_kl.coefficient = 0.001


def _toy_sizes(c) -> None:
  """Shrinks a run to seconds, on the same path; the tiny model reads any text, byte by byte."""
  c.total_steps = 2
  if c.method.teacher_context.name == "hindsight":
    c.method.teacher_context.hint_tokens = 16
  if c.model.path != "tiny_household":
    c.model.update(path="tiny", dtype="float32", remat="dots")
    # a house with all its furniture takes most of the model's 1,024 positions
    first, episode = (900, 64) if c.env.name == "alfworld" else (700, 250)
    c.data.update(max_prompt_tokens=first, max_teacher_tokens=first + 60, length_multiple=128)
    c.rollout.update(max_new_tokens=12, max_episode_tokens=episode)
  c.mesh.fsdp = 1  # too few rows to share
  c.train.update(updates_per_batch=1, micro_batches=1)
  c.optimizer.warmup_steps = 0
  c.rollout.update(questions=2, group=2, rows=4)
  c.eval.update(every_steps=2, questions=2, samples=1, final_splits=c.eval.splits)
  c.checkpoint.every_steps = 2
  c.log.rollouts_every_steps = 1
  config.remember_two_questions(c)
