"""Signs that a run goes wrong, read off its metrics, each with the setting to change. Host side, pure functions.

`warnings` compares the last WINDOW steps of metrics.jsonl with the first WINDOW; it says nothing before there are two windows. Its limits are
rules of thumb, not measurements: they ask a person to look, and change nothing. A fall in length or entropy is only a sign while the reward
has not risen (SDPO's responses grow shorter as they get better, arXiv 2601.20802).

The copy rate is the share of a response's n-grams of tokens that stand in what its teacher read, a solution or feedback, and not in the
question. The policy has not read that text: a rate that climbs means that it recites rather than solves.
"""

import functools

from sdpo_jax.data.chat import Chat
from sdpo_jax.records import Ratio, Rollout

WINDOW = 10  # steps
NGRAM = 8  # tokens


def copy_rate(rollouts: list[Rollout], contexts, chat: Chat) -> Ratio:
  """n-grams that were copied, over all n-grams of responses that have a teacher. contexts[b]: what the teacher of rollouts[b] read, or None."""
  # a group shows one solution to many
  grams = functools.cache(lambda text: frozenset(ngrams(chat.text_tokens(text))))
  copied = total = 0
  for rollout, context in zip(rollouts, contexts):
    if context is None:
      continue
    shown, asked, said = (
      grams(context.solution) | grams(context.feedback),
      set(ngrams(rollout.prompt_tokens)),
      ngrams(rollout.tokens),
    )
    copied, total = (
      copied + sum(gram in shown and gram not in asked for gram in said),
      total + len(said),
    )
  return Ratio(copied, total)


def ngrams(tokens: list[int]) -> list[tuple[int, ...]]:
  return list(zip(*(tokens[i:] for i in range(NGRAM))))


def warnings(history: list[dict]) -> dict[str, str]:
  """{sign: what is seen and what to change} at the last of these lines of metrics.jsonl; lines of an evaluation alone do not count."""
  steps = [line for line in history if "train/loss" in line]
  if len(steps) < 2 * WINDOW:
    return {}

  def mean(name, lines):
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else None

  def both(name):
    """Its mean at first and at last; None where one of them is missing."""
    found = mean(name, steps[:WINDOW]), mean(name, steps[-WINDOW:])
    return None if None in found else found

  reward = both("train/reward")
  better = reward is not None and reward[1] > reward[0] + 0.02
  taught = any("train/loss_distill" in line for line in steps[-WINDOW:])
  found = {}

  length = both("rollout/length")
  if length and not better and length[1] < 0.25 * length[0]:
    found["length"] = (
      f"responses shrank from {length[0]:.0f} to {length[1]:.0f} tokens and the reward did not rise: lower config.optimizer.lr, or "
      "keep rewards in the loss with method=sdpo_blend"
    )
  truncated = both("rollout/truncated")
  if truncated and truncated[1] > 0.5 and truncated[1] > truncated[0] + 0.1:
    found["truncated"] = (
      f"{truncated[1]:.0%} of the responses are cut at their limit, {truncated[0]:.0%} at first: raise config.rollout.max_new_tokens, "
      "or lower config.optimizer.lr if they repeat themselves"
    )
  entropy = both("train/entropy")
  if entropy and not better and entropy[1] < 0.1 * entropy[0]:
    found["entropy"] = (
      f"the policy's entropy fell from {entropy[0]:.3f} to {entropy[1]:.3f} nats a token and the reward did not rise: lower "
      "config.optimizer.lr, or raise config.rollout.group so that groups disagree again"
    )
  if entropy and entropy[1] > 3.0 * max(entropy[0], 0.05):
    found["entropy"] = (
      f"the policy's entropy grew from {entropy[0]:.3f} to {entropy[1]:.3f} nats a token: lower config.optimizer.lr, or slow the "
      "teacher down (config.method.teacher_weights.rate)"
    )
  gap = both("train/teacher_gap_abs")
  if gap and gap[1] > 3.0 * max(gap[0], 0.01):
    found["gap"] = (
      f"policy and teacher drift apart ({gap[0]:.3f} to {gap[1]:.3f} nats a token): lower config.optimizer.lr, or hold the teacher with "
      "config.method.teacher_weights.name=trust_region"
    )
  if gap and not better and gap[1] < 0.02 * gap[0]:
    found["gap"] = (
      f"policy and teacher hardly differ any more ({gap[0]:.3f} to {gap[1]:.3f} nats a token) and the reward did not rise: the context "
      "teaches nothing new; look at teacher_context in rollouts/, or slow the teacher down (config.method.teacher_weights.rate)"
    )
  share = both("data/teacher_share")
  if taught and share and share[1] < 0.1:
    found["teacher_share"] = (
      f"only {share[1]:.0%} of the responses have a teacher: raise config.rollout.group so that some succeed, show feedback "
      "(config.method.teacher_context.feedback=without_solution), or begin with easier questions"
    )
  copied = both("data/copy_rate")
  if copied and copied[1] > 0.5 and copied[1] > copied[0] + 0.25:
    found["copy_rate"] = (
      f"{copied[1]:.0%} of what the responses say stands word for word in what their teachers read, {copied[0]:.0%} at first: show "
      "another success each time (config.method.teacher_context.demonstration=random) or feedback alone "
      "(config.method.teacher_context.use_solution=False)"
    )
  return found
