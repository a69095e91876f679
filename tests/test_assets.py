"""The tiny base models that come with the package: their tokenizers are the ones that the corpus builds, and hindsight helps them."""

import dataclasses
import pathlib

import pytest

from sdpo_jax import alternatives, config
from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import DOMAINS, Mixture, build_tokenizer
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.objectives.notes import Notes, failed, further_readings
from sdpo_jax.objectives.teacher_context import FEEDBACK, FeedbackOrSolution
from sdpo_jax.pretrain import accuracy
from sdpo_jax.records import Sampling
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
    model,
    chat,
    domain,
    dataclasses.asdict(Mixture(notes=reads, imagine=reads)),
    questions=128,
    max_new_tokens=28,
    sampler=LocalEngine(model, rows=128, prompt_multiple=128, chunk=64, pad_token=chat.pad_token),
  )
  for view, (lowest, highest) in ranges.items():
    assert lowest <= solved[f"eval/{view}"] <= highest, solved


@pytest.mark.slow
@pytest.mark.parametrize("domain, helped", [("arithmetic", True), ("tinycode", False)])
def test_what_the_untrained_teacher_makes_of_notes(domain, helped):
  """Share that it solves, greedy, of failed attempts at 200 held-out questions with two failed alternatives; the figures of configs/counterfactual.py (`-s` prints them)."""
  c = config.load(
    f"{pathlib.Path(__file__).parent.parent}/configs/counterfactual.py:domain={domain}"
  )
  with open_session(c) as w:
    env, sampling = (
      w.collector.env,
      Sampling(c.rollout.max_new_tokens, 1.0, 1.0, w.chat.stop_tokens),
    )
    tasks = [env.task("heldout", i) for i in range(200)]
    told, shares = {}, {}
    for how in ("verified", "imagined"):
      # the same attempts both times
      groups = w.collector.collect(w.params, tasks, n=1, sampling=sampling, seeds=range(200))
      settings = dict(feedback=how, imagined_tokens=128) if how == "imagined" else {}
      explorer = alternatives.Explorer(
        Notes(**settings),
        w.collector,
        seed=0,
        success_threshold=0.5,
        max_prompt_tokens=c.data.max_teacher_tokens,
      )
      said = explorer.explore(w.params, groups, sampling=sampling, step=0)
      told[how] = {
        q: g
        for q, g in enumerate(groups)
        if len(g[0].alternatives) == 2 and all(failed(a.rollout, 0.5) for a in g[0].alternatives)
      }
    shared = sorted(told["verified"].keys() & told["imagined"].keys())
    plain = FeedbackOrSolution(feedback="always")

    def read(how, q, templates):
      shown = FeedbackOrSolution(feedback="always", templates=templates)
      context, _ = further_readings(Notes(), shown, told[how][q], 0)[0]
      return context

    only_z = {"note": FEEDBACK + "{feedback}"}
    views = {
      "feedback": lambda q: plain(told["verified"][q], 0),
      "notes": lambda q: read("verified", q, {}),
      "Z alone": lambda q: read("verified", q, only_z),
      "imagined": lambda q: read("imagined", q, {}),
    }
    for view, context in views.items():
      prompts = [
        teacher_prompt(w.chat, env.prompt(tasks[q]), context(q), c.data.max_teacher_tokens)[0]
        for q in shared
      ]
      answers = w.collector.engine.generate(
        w.params,
        prompts,
        n=1,
        sampling=dataclasses.replace(sampling, temperature=0.0),
        seeds=[0] * len(prompts),
      )
      solved = [
        env.judge(tasks[shared[a.prompt_index]], w.chat.response_text(a.tokens)).reward
        for a in answers
      ]
      shares[view] = sum(reward >= 0.5 for reward in solved) / len(solved)
  print(
    domain,
    len(shared),
    {view: f"{share:.1%}" for view, share in shares.items()},
    {
      name: f"{said[name].mean:.1%}"
      for name in ("counterfactual/imagined_wrong", "counterfactual/imagined_verdict_wrong")
    },
  )
  assert len(shared) > 60 and shares["imagined"] < shares["feedback"], shares
  assert (
    shares["notes"] >= shares["feedback"]
    if helped
    else abs(shares["notes"] - shares["feedback"]) < 0.1
  ), shares
