r"""Alternatives to failed attempts and what they would have received: sampled, judged or imagined. Host side.

Alternatives come from the same engine (but for `model`) and are judged in the same pool as rollouts (`rollout.Collector`):
  samples    M more responses to the question, drawn once and shared by its failed attempts
  model      likewise, from a second model: through a collector of its own, whose engine and chat speak its tokens. Only their text and verdict are used;
             what they cost is counted in its tokens
  branches   M continuations of each failed attempt from its most uncertain position on: where the sampled token had the lowest
             log-probability, since the host knows that and not the entropy. A branch may take another max_new_tokens from there.
  siblings   the other responses of the group, judged already: free
Two that behave alike count once, and one that behaves like the attempt not at all: the same answer of the environment's `behaviour(task,
response)` if it has one, else the same reward and feedback. Of imagined alternatives the text alone is compared. One that could not be judged is
told to nobody, and counted.

Imagined feedback is sampled from the policy itself, under the prompt of `imagining`: the question, the attempt with its real verdict as an example of
the environment's format, and the alternative. The alternative is judged all the same, to measure how often the imagination is wrong; nothing
that the judge says of it reaches a teacher. Where that prompt is too long the alternative is dropped, and counted.

Multi-host: every process sees the same groups and calls the engine alike.
"""

import dataclasses
from typing import Any

from sdpo_jax.objectives.notes import Part, distinct, failed, imagining, truth
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Alternative, Ratio, Rollout, Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed


def explore(
  part: Part,
  collector: Collector,
  params,
  groups: list[list[Rollout]],
  *,
  sampling: Sampling,
  seed: int,
  step: int,
  success_threshold: float,
  max_prompt_tokens: int,
  other: tuple[Collector, Any] | None = None,
) -> dict[str, Ratio]:
  """Gives every failed rollout its alternatives and what they cost; returns metrics.

  max_prompt_tokens: of the imagining prompt. other: the second model's collector and weights, if the sources hold "model".
  """
  wanting = [
    (q, i)
    for q, group in enumerate(groups)
    for i, r in enumerate(group)
    if failed(r, success_threshold)
  ]
  found = {at: [] for at in wanting}
  first = {q: i for q, i in reversed(wanting)}
  questions = sorted(first)
  for source, drawer in (("samples", (collector, params)), ("model", other)):
    if source in part.sources and wanting:
      drawing, weights = drawer
      drawn = drawing.collect(
        weights,
        [groups[q][0].task for q in questions],
        n=part.alternatives,
        sampling=dataclasses.replace(sampling, stop_tokens=drawing.chat.stop_tokens),
        seeds=[prompt_seed(seed, source, step, q) for q in questions],
      )
      for q, rollouts in zip(questions, drawn):
        charge(
          groups[q][first[q]], tokens=sum(len(r.tokens) for r in rollouts), calls=len(rollouts)
        )
      for q, i in wanting:
        found[q, i] += [Alternative(r, source) for r in drawn[questions.index(q)]]
  if "branches" in part.sources and wanting:
    begun = [
      (r.tokens[:t], r.logp[:t])
      for r, t in ((groups[q][i], uncertain(groups[q][i])) for q, i in wanting)
    ]
    drawn = collector.collect(
      params,
      [groups[q][i].task for q, i in wanting],
      n=part.alternatives,
      sampling=sampling,
      seeds=[prompt_seed(seed, "branches", step, q, i) for q, i in wanting],
      begun=begun,
    )
    for (q, i), rollouts, (head, _) in zip(wanting, drawn, begun):
      charge(
        groups[q][i], tokens=sum(len(r.tokens) - len(head) for r in rollouts), calls=len(rollouts)
      )
      found[q, i] += [Alternative(r, "branches") for r in rollouts]
  dropped = 0
  if part.feedback == "imagined":
    dropped = imagine(
      part,
      collector,
      params,
      groups,
      found,
      sampling=sampling,
      seed=seed,
      step=step,
      max_prompt_tokens=max_prompt_tokens,
    )
  if "siblings" in part.sources:
    for q, i in wanting:
      found[q, i] += [Alternative(r, "siblings") for j, r in enumerate(groups[q]) if j != i]
  # attempts share some
  unjudged = {
    id(a.rollout)
    for at in wanting
    for a in found[at]
    if a.rollout.feedback.status is Status.ENV_FAILED
  }
  ask = getattr(collector.env, "behaviour", None)
  behaviour = lambda r: ask(r.task, r.text) if ask else (r.feedback.reward, r.feedback.text)
  for q, i in wanting:
    groups[q][i].alternatives = distinct(
      found[q, i],
      groups[q][i],
      most=part.alternatives,
      success_threshold=success_threshold,
      behaviour=behaviour,
    )
  return measure([groups[q][i] for q, i in wanting], success_threshold) | {
    "counterfactual/not_imagined": float(dropped),
    "counterfactual/not_judged": float(len(unjudged)),
  }


def charge(rollout: Rollout, *, tokens: int, calls: int = 0) -> None:
  rollout.extra_tokens += tokens
  rollout.extra_calls += calls


def uncertain(rollout: Rollout) -> int:
  """The index of the response's least likely token."""
  return min(range(len(rollout.logp)), key=rollout.logp.__getitem__)


def imagine(
  part: Part,
  collector: Collector,
  params,
  groups,
  found: dict[tuple[int, int], list[Alternative]],
  *,
  sampling: Sampling,
  seed: int,
  step: int,
  max_prompt_tokens: int,
) -> int:
  """Puts the imagined feedback into `found`, in place; returns how many had to be dropped. Each text is asked about once a question."""
  asked = {}  # (question, text): (attempt that bears the cost, prompt)
  for (q, i), alternatives in found.items():
    for a in alternatives:
      asked.setdefault(
        (q, a.rollout.text), (groups[q][i], imagining_prompt(collector, groups[q][i], a.rollout))
      )
  fitting = {key: value for key, value in asked.items() if len(value[1]) <= max_prompt_tokens}
  prompts, said = [prompt for _, prompt in fitting.values()], {}
  keys, seeds = list(fitting), [prompt_seed(seed, "imagine", step, n) for n in range(len(prompts))]
  for c in collector.engine.generate(
    params,
    prompts,
    n=1,
    sampling=dataclasses.replace(sampling, max_new_tokens=part.imagined_tokens),
    seeds=seeds,
  ):
    key = keys[c.prompt_index]
    said[key] = without_thinking(collector.chat.response_text(c.tokens)).strip()
    charge(fitting[key][0], tokens=len(c.tokens))
  for (q, i), alternatives in found.items():
    found[q, i] = [
      dataclasses.replace(a, imagined=said[q, a.rollout.text])
      for a in alternatives
      if (q, a.rollout.text) in said
    ]
  return len(asked) - len(fitting)


def imagining_prompt(collector: Collector, attempt: Rollout, alternative: Rollout) -> list[int]:
  *before, last = collector.env.prompt(attempt.task)
  text = imagining(last["content"], attempt, alternative)
  return collector.chat.prompt_tokens([*before, last | {"content": text}], teacher=True)


def measure(attempts: list[Rollout], success_threshold: float) -> dict[str, Ratio]:
  """Of the failed attempts of a batch. Imagined feedback is wrong if it is not the judge's word for word, its verdict if the first line is not."""
  told = [a for r in attempts for a in r.alternatives]
  imagined = [
    (a.imagined, truth(a.rollout, success_threshold)) for a in told if a.imagined is not None
  ]
  verified = [a for a in told if a.imagined is None]
  verdict = lambda text: text.split("\n")[0]
  return {
    "counterfactual/generated_tokens": float(sum(r.extra_tokens for r in attempts)),
    "counterfactual/env_calls": float(sum(r.extra_calls for r in attempts)),
    "counterfactual/alternatives": Ratio(len(told), len(attempts)),
    "counterfactual/successes": Ratio(
      sum(not failed(a.rollout, success_threshold) for a in verified), len(verified)
    ),
    "counterfactual/imagined_wrong": Ratio(
      sum(said != true for said, true in imagined), len(imagined)
    ),
    "counterfactual/imagined_verdict_wrong": Ratio(
      sum(verdict(said) != verdict(true) for said, true in imagined), len(imagined)
    ),
  }
