r"""Finds alternatives to failed attempts, and what they would have received. Host side.

They are sampled, then judged or imagined. But for `model` they come from the policy's own engine,
and all are judged in the same pool as rollouts (`rollout.Collector`):

  samples    M more responses to the question, drawn once and shared by its failed attempts
  model      likewise, from a second model through a collector of its own, whose engine and chat
             speak its tokens; only text and verdict are used, and the cost is counted in its tokens
  branches   M continuations of each failed attempt from the position on where the policy's entropy
             was highest, the first such; a branch may take another max_new_tokens from there
  beams      likewise, but the likeliest M that a beam search finds (engine/beams.py), by the sum of
             their log-probabilities at the rollouts' temperature; rollout.top_p does not cut it
  siblings   the other responses of the group, judged already: free

Of alternatives that behave alike one counts, and one that behaves like the attempt does not count.
Alike means: the same answer of the environment's `behaviour(task, response)` if it has one, else
the same reward and feedback. Of imagined alternatives the text alone is compared. One that could
not be judged is shown to nobody, and counted.

Imagined feedback is sampled from the policy itself, under the prompt of `notes.imagining`. This
holds the question, the attempt with its real verdict as an example of the format, and the
alternative. The alternative is judged all the same, to measure how often the imagination is wrong;
nothing that the judge says of it reaches a teacher. Where that prompt is too long the alternative
is dropped, and counted.

With feedback="opposite" the verdict on every alternative, siblings too, is turned round.

Multi-host: every process sees the same groups and calls the engine alike.
"""

import dataclasses
from typing import Any

from sdpo_jax.objectives.notes import (
  Notes,
  distinct,
  failed,
  imagining,
  opposite_feedback,
  true_feedback,
)
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Alternative, Ratio, Request, Rollout, Sampling, Status
from sdpo_jax.rollout import Collector, prompt_seed, sample

# The place of a failed attempt among the groups: (question, response).
Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Explorer:
  """Gives failed attempts their alternatives; made once per run.

  max_prompt_tokens: of the prompt that asks for imagined feedback.
  second_model: its collector and weights, which the source "model" needs.
  """

  notes: Notes
  collector: Collector
  seed: int
  success_threshold: float
  max_prompt_tokens: int
  second_model: tuple[Collector, Any] | None = None

  def explore(
    self, params, groups: list[list[Rollout]], *, sampling: Sampling, step: int
  ) -> dict[str, Ratio | float]:
    """Sets `alternatives`, `extra_tokens` and `extra_calls` of every failed rollout.

    Returns metrics of the step.
    """
    places = [
      (q, i)
      for q, group in enumerate(groups)
      for i, rollout in enumerate(group)
      if failed(rollout, self.success_threshold)
    ]
    candidates = {place: [] for place in places}
    sampling = dataclasses.replace(sampling, entropy=False)  # nothing branches off an alternative
    if places:
      self._draw_per_question("samples", self.collector, params, groups, candidates, sampling, step)
      if "model" in self.notes.sources:
        assert self.second_model is not None, "the source 'model' needs a second model"
        self._draw_per_question("model", *self.second_model, groups, candidates, sampling, step)
      for source in ("branches", "beams"):
        self._draw_branches(source, params, groups, candidates, sampling, step)
    dropped = 0
    if self.notes.feedback == "imagined":
      dropped = self._imagine(params, groups, candidates, sampling, step)
    if "siblings" in self.notes.sources:
      for q, i in places:
        siblings = [r for j, r in enumerate(groups[q]) if j != i]
        candidates[q, i] += [Alternative(r, "siblings") for r in siblings]
    if self.notes.feedback == "opposite":
      self._turn_round(candidates)
    for q, i in places:
      groups[q][i].alternatives = distinct(
        candidates[q, i],
        groups[q][i],
        most=self.notes.alternatives,
        success_threshold=self.success_threshold,
        behaviour=self._behaviour,
      )
    return measure([groups[q][i] for q, i in places], self.success_threshold) | {
      "counterfactual/not_imagined": float(dropped),
      "counterfactual/not_judged": float(count_unjudged(candidates)),
    }

  def _behaviour(self, rollout: Rollout):
    """Something that is equal for responses that do the same."""
    behaviour = getattr(self.collector.env, "behaviour", None)
    if behaviour is None:
      return rollout.feedback.reward, rollout.feedback.text
    return behaviour(rollout.task, rollout.text)

  def _draw_per_question(
    self, source: str, collector: Collector, params, groups, candidates, sampling: Sampling, step
  ) -> None:
    """Draws M responses to each question with a failed attempt; the first failed one pays."""
    if source not in self.notes.sources:
      return
    first_failed = {}
    for q, i in candidates:
      first_failed.setdefault(q, i)
    questions = sorted(first_failed)
    # A second model ends its responses with tokens of its own.
    sampling = dataclasses.replace(sampling, stop_tokens=collector.chat.stop_tokens)
    drawn = collector.collect(
      params,
      [groups[q][0].task for q in questions],
      n=self.notes.alternatives,
      sampling=sampling,
      seeds=[prompt_seed(self.seed, source, step, q) for q in questions],
      version=step - 1,
    )
    for q, rollouts in zip(questions, drawn):
      tokens = sum(len(r.tokens) for r in rollouts)
      charge(groups[q][first_failed[q]], tokens=tokens, calls=len(rollouts))
      for place in candidates:
        if place[0] == q:
          candidates[place] += [Alternative(r, source) for r in rollouts]

  def _draw_branches(
    self, source: str, params, groups, candidates, sampling: Sampling, step
  ) -> None:
    """Finds M continuations of each failed attempt from where the entropy was highest."""
    if source not in self.notes.sources:
      return
    if source == "beams":
      sampling = dataclasses.replace(sampling, beams=self.notes.beam_width, top_p=1.0)
    attempts = [groups[q][i] for q, i in candidates]
    heads = []
    for attempt in attempts:
      length = most_uncertain(attempt)
      heads.append((attempt.tokens[:length], attempt.logp[:length]))
    drawn = self.collector.collect(
      params,
      [attempt.task for attempt in attempts],
      n=self.notes.alternatives,
      sampling=sampling,
      seeds=[prompt_seed(self.seed, source, step, q, i) for q, i in candidates],
      version=step - 1,
      begun=heads,
    )
    for place, attempt, rollouts, (head, _) in zip(candidates, attempts, drawn, heads):
      tokens = sum(len(r.tokens) - len(head) for r in rollouts)
      charge(attempt, tokens=tokens, calls=len(rollouts))
      candidates[place] += [Alternative(r, source) for r in rollouts]

  def _imagine(self, params, groups, candidates, sampling: Sampling, step) -> int:
    """Puts imagined feedback into the candidates, and drops those whose prompt is too long.

    Each text is imagined once a question. Returns how many texts were dropped.
    """
    # (question, text) -> (the attempt that bears the cost, the prompt)
    prompts = {}
    for (q, i), alternatives in candidates.items():
      for a in alternatives:
        prompt = self._imagining_prompt(groups[q][i], a.rollout)
        prompts.setdefault((q, a.rollout.text), (groups[q][i], prompt))
    fitting = {
      key: (attempt, prompt)
      for key, (attempt, prompt) in prompts.items()
      if len(prompt) <= self.max_prompt_tokens
    }
    feedback = {}
    sampling = dataclasses.replace(sampling, max_new_tokens=self.notes.imagined_tokens)
    requests = [
      Request(key, prompt, 1, sampling, prompt_seed(self.seed, "imagine", step, n))
      for n, (key, (_, prompt)) in enumerate(fitting.items())
    ]
    self.collector.engine.load(params, step - 1)
    for completion in sample(self.collector.engine, requests):
      text = self.collector.chat.response_text(completion.tokens, teacher=True)
      feedback[completion.key] = without_thinking(text).strip()
      charge(fitting[completion.key][0], tokens=len(completion.tokens))
    self.collector.engine.unload()
    for (q, i), alternatives in candidates.items():
      candidates[q, i] = [
        dataclasses.replace(a, imagined=feedback[q, a.rollout.text])
        for a in alternatives
        if (q, a.rollout.text) in feedback
      ]
    return len(prompts) - len(fitting)

  def _turn_round(self, candidates: dict[Place, list[Alternative]]) -> None:
    """Puts the opposite of the judge's verdict into the candidates."""
    for place, alternatives in candidates.items():
      candidates[place] = [
        dataclasses.replace(a, imagined=opposite_feedback(a.rollout, self.success_threshold))
        for a in alternatives
      ]

  def _imagining_prompt(self, attempt: Rollout, alternative: Rollout) -> list[int]:
    *before, last = self.collector.env.prompt(attempt.task)
    text = imagining(last["content"], attempt, alternative)
    messages = [*before, last | {"content": text}]
    return self.collector.chat.prompt_tokens(messages, teacher=True)


def charge(rollout: Rollout, *, tokens: int, calls: int = 0) -> None:
  """Adds generated tokens and judgements to what a rollout has cost beside itself."""
  rollout.extra_tokens += tokens
  rollout.extra_calls += calls


def most_uncertain(rollout: Rollout) -> int:
  """Returns the index of the token at which the policy's entropy was highest, the first such."""
  assert rollout.entropy is not None, "`Sampling.entropy` asks for what branches begin at"
  return max(range(len(rollout.entropy)), key=rollout.entropy.__getitem__)


def count_unjudged(candidates: dict[Place, list[Alternative]]) -> int:
  """Returns how many responses have no verdict. Attempts share some, which count once."""
  unjudged = set()
  for alternatives in candidates.values():
    for a in alternatives:
      if a.rollout.feedback.status is Status.ENV_FAILED:
        unjudged.add(id(a.rollout))
  return len(unjudged)


def measure(attempts: list[Rollout], success_threshold: float) -> dict[str, Ratio | float]:
  """Returns metrics of the failed attempts of a batch.

  Imagined feedback is wrong if it is not the judge's word for word; its verdict is wrong if the
  first line is not.
  """
  alternatives = [a for attempt in attempts for a in attempt.alternatives]
  verified = [a for a in alternatives if a.imagined is None]
  imagined = [a for a in alternatives if a.imagined is not None]
  successes = wrong = wrong_verdicts = 0
  for a in verified:
    successes += not failed(a.rollout, success_threshold)
  for a in imagined:
    right = true_feedback(a.rollout, success_threshold)
    wrong += a.imagined != right
    wrong_verdicts += a.imagined.split("\n")[0] != right.split("\n")[0]
  return {
    "counterfactual/generated_tokens": float(sum(r.extra_tokens for r in attempts)),
    "counterfactual/env_calls": float(sum(r.extra_calls for r in attempts)),
    "counterfactual/alternatives": Ratio(len(alternatives), len(attempts)),
    "counterfactual/successes": Ratio(successes, len(verified)),
    "counterfactual/imagined_wrong": Ratio(wrong, len(imagined)),
    "counterfactual/imagined_verdict_wrong": Ratio(wrong_verdicts, len(imagined)),
  }
