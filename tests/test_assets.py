"""The tiny base models that come with the package.

Their tokenizers are the ones that the corpus builds, and hindsight helps them.
"""

import dataclasses
import pathlib

import pytest

from sdpo_jax import alternatives, config
from sdpo_jax.acting import success
from sdpo_jax.config import MODELS
from sdpo_jax.data import household_rows
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import DOMAINS, Mixture, build_tokenizer
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.objectives.notes import Notes, failed, further_readings
from sdpo_jax.objectives.teacher_context import FEEDBACK, FeedbackOrSolution
from sdpo_jax.pretrain import accuracy
from sdpo_jax.records import Request, Sampling
from sdpo_jax.session import open_session

# domain, model, what it solves: ranges that hold the shares over 256 problems in
# configs/pretrain_tiny.py, and what 128 of them may differ by
ASSETS = [
  ("tinycode", "tiny", dict(plain=(0.05, 0.20), feedback=(0.30, 0.55), solution=(0.98, 1.0))),
  (
    "tinycode",
    "tiny_notes",
    dict(
      plain=(0.03, 0.20),
      feedback=(0.28, 0.52),
      solution=(0.97, 1.0),
      notes=(0.28, 0.52),
      imagine_verdict=(0.70, 0.95),
    ),
  ),
  (
    "arithmetic",
    "tiny_arithmetic",
    dict(
      plain=(0.01, 0.15),
      feedback=(0.50, 0.75),
      solution=(0.98, 1.0),
      notes=(0.60, 0.90),
      imagine_verdict=(0.60, 1.0),
    ),
  ),
]


@pytest.mark.parametrize("name, path, ranges", ASSETS, ids=[path for _, path, _ in ASSETS])
def test_hindsight_helps(name, path, ranges):
  tokenizer, (domain, _) = load_tokenizer(MODELS[path]), DOMAINS[name]
  assert tokenizer.get_vocab() == build_tokenizer(name).get_vocab()
  model, params = load_pretrained(MODELS[path], dtype="float32")
  chat, reads = Chat(tokenizer), 1.0 if "notes" in ranges else 0.0
  solved = accuracy(
    params,
    chat,
    domain,
    dataclasses.asdict(Mixture(notes=reads, imagine=reads)),
    questions=128,
    max_new_tokens=28,
    sampler=LocalEngine(model, rows=128),
  )
  for view, (lowest, highest) in ranges.items():
    assert lowest <= solved[f"eval/{view}"] <= highest, solved


def test_a_skill_helps_the_model_that_acts():
  """It does what it is told of; other words tell it nothing."""
  tokenizer = load_tokenizer(MODELS["tiny_household"])
  assert tokenizer.get_vocab() == household_rows.build_tokenizer().get_vocab()
  model, params = load_pretrained(MODELS["tiny_household"], dtype="float32")
  shares = success(params, LocalEngine(model, rows=40), Chat(tokenizer), tasks=40)
  assert shares["eval/skill"] >= 0.65, shares
  assert shares["eval/alone"] <= 0.55 and shares["eval/random_skill"] <= 0.55, shares


def failed_twice(session, c, tasks, sampling, **settings):
  """Failed attempts at the tasks with two failed alternatives, {task's number: group of one}.

  The attempts are the same for all settings of the notes. Returned as well: the metrics.
  """
  collector, params = session.collector, session.params
  groups = collector.collect(params, tasks, n=1, sampling=sampling, seeds=range(len(tasks)))
  explorer = alternatives.Explorer(
    Notes(**settings),
    collector,
    seed=0,
    success_threshold=0.5,
    max_prompt_tokens=c.data.max_teacher_tokens,
  )
  metrics = explorer.explore(params, groups, sampling=sampling, step=0)
  chosen = {}
  for q, group in enumerate(groups):
    others = group[0].alternatives
    if len(others) == 2 and all(failed(other.rollout, 0.5) for other in others):
      chosen[q] = group
  return chosen, metrics


def context_with_notes(group, templates):
  shown = FeedbackOrSolution(feedback="always", templates=templates)
  context, _ = further_readings(Notes(), shown, group, 0)[0]
  return context


def share_solved(session, tasks, contexts, sampling, max_teacher_tokens):
  """The share of tasks that the teacher solves with these contexts, greedily."""
  env, chat = session.collector.env, session.chat
  greedy = dataclasses.replace(sampling, temperature=0.0)
  requests = []
  for task, context in zip(tasks, contexts, strict=True):
    prompt, _ = teacher_prompt(chat, env.prompt(task), context, max_teacher_tokens)
    requests.append(Request(task, prompt, 1, greedy, seed=0))
  engine = session.collector.engine
  engine.load(session.params, 0)
  rewards = [
    env.judge(c.key, chat.response_text(c.tokens)).reward for c in engine.generate(requests)
  ]
  return sum(reward >= 0.5 for reward in rewards) / len(rewards)


@pytest.mark.slow
@pytest.mark.parametrize("domain, helped", [("arithmetic", True), ("tinycode", False)])
def test_what_the_untrained_teacher_makes_of_notes(domain, helped):
  """The share that it solves of 200 held-out questions with failed attempts and alternatives.

  These are the figures of configs/counterfactual.py (`-s` prints them).
  """
  configs = pathlib.Path(__file__).parent.parent / "configs"
  c = config.load(f"{configs}/counterfactual.py:domain={domain}")
  with open_session(c) as session:
    sampling = Sampling(c.rollout.max_new_tokens, 1.0, 1.0, session.chat.stop_tokens)
    tasks = [session.collector.env.task("heldout", i) for i in range(200)]
    verified, _ = failed_twice(session, c, tasks, sampling, feedback="verified")
    imagined, metrics = failed_twice(
      session, c, tasks, sampling, feedback="imagined", imagined_tokens=128
    )
    shared = sorted(verified.keys() & imagined.keys())
    only_z = {"note": FEEDBACK + "{feedback}"}
    plain = FeedbackOrSolution(feedback="always")
    views = {
      "feedback": [plain(verified[q], 0) for q in shared],
      "notes": [context_with_notes(verified[q], {}) for q in shared],
      "Z alone": [context_with_notes(verified[q], only_z) for q in shared],
      "imagined": [context_with_notes(imagined[q], {}) for q in shared],
    }
    shared_tasks = [tasks[q] for q in shared]
    shares = {
      view: share_solved(session, shared_tasks, contexts, sampling, c.data.max_teacher_tokens)
      for view, contexts in views.items()
    }
  wrong = ("counterfactual/imagined_wrong", "counterfactual/imagined_verdict_wrong")
  print(
    domain,
    len(shared),
    {view: f"{share:.1%}" for view, share in shares.items()},
    {name: f"{metrics[name].mean:.1%}" for name in wrong},
  )
  assert len(shared) > 60
  assert shares["imagined"] < shares["feedback"], shares
  if helped:
    assert shares["notes"] >= shares["feedback"], shares
  else:
    assert abs(shares["notes"] - shares["feedback"]) < 0.1, shares
