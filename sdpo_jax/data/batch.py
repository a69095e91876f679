"""Groups of rollouts -> teacher prompts -> one padded TrainBatch, with a count of everything that was cut or dropped.

Rows stand question first (B = Q x G), so that an optimiser update over consecutive rows sees whole groups. Lengths are rounded
up to a bucket, which bounds the number of shapes the train step is compiled for.
Over-long teacher prompts: the feedback is shortened first, then the solution; the question, the closing instruction and the
generation header are never touched. What was shortened is counted.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Rollout, Status, TrainBatch

CUT = "\n[...]\n"


class Packed(NamedTuple):
  batch: TrainBatch
  contexts: list[Context | None]   # what each row's teacher reads; None: nothing
  metrics: dict[str, float]        # counts of what was dropped, shortened, shown


def bucket(length: int, multiple: int) -> int:
  return max(multiple, -(-length // multiple) * multiple)


def shorten(text: str, keep: int) -> str:
  """At most `keep` characters: the head and the tail, which hold the error and its place, with a visible gap."""
  if len(text) <= keep:
    return text
  keep = max(keep - len(CUT), 0)
  return text[:(keep + 1) // 2] + CUT + (text[len(text) - keep // 2:] if keep // 2 else "")


def teacher_prompt(chat: Chat, messages: list[dict[str, str]], context: Context, max_tokens: int) -> tuple[list[int], bool]:
  """Tokens of the teacher's prompt and whether its texts had to be shortened. The user's last message carries the context."""

  def render(c: Context) -> list[int]:
    return chat.prompt_tokens(messages[:-1] + [messages[-1] | {"content": c.render(messages[-1]["content"])}], teacher=True)

  tokens = render(context)
  if len(tokens) <= max_tokens:
    return tokens, False
  for field in ("feedback", "solution"):
    low, high = 0, len(getattr(context, field))   # the longest text that fits, by bisection
    if not high:
      continue
    while low < high:
      middle = (low + high + 1) // 2
      if len(render(dataclasses.replace(context, **{field: shorten(getattr(context, field), middle)}))) <= max_tokens:
        low = middle
      else:
        high = middle - 1
    context = dataclasses.replace(context, **{field: shorten(getattr(context, field), low)})
    tokens = render(context)
    if len(tokens) <= max_tokens:
      return tokens, True
  raise ValueError(f"a question with its closing instruction takes {len(tokens)} tokens, more than data.max_teacher_tokens={max_tokens}")


def pack(groups: list[list[Rollout]], *, chat: Chat, messages, teacher_context, advantage, max_teacher_tokens: int, length_multiple: int,
         response_multiple: int) -> Packed:
  """groups[q][g]: rollouts. messages(task) -> chat messages; teacher_context(group, i) -> Context | None; advantage(reward_QG) -> advantage_QG."""
  rows = [r for group in groups for r in group]
  contexts = [teacher_context(group, i) for group in groups for i in range(len(group))]
  valid = [r.feedback.status is not Status.ENV_FAILED and np.isfinite(r.feedback.reward) for r in rows]
  reward_QG = np.array([[r.feedback.reward if r.feedback.status is not Status.ENV_FAILED else np.nan for r in g] for g in groups], np.float32)
  advantage_B = advantage(reward_QG).reshape(-1).astype(np.float32)

  teacher_prompts, shortened = [], 0
  for r, context in zip(rows, contexts):
    if context is None:   # nothing to show: the teacher half reads the plain prompt and its row weighs nothing
      teacher_prompts.append(r.prompt_tokens)
    else:
      tokens, was_cut = teacher_prompt(chat, messages(r.task), context, max_teacher_tokens)
      teacher_prompts.append(tokens)
      shortened += was_cut

  B = len(rows)
  R = bucket(max(len(r.tokens) for r in rows), response_multiple)
  T = bucket(max(len(r.prompt_tokens) + len(r.tokens) for r in rows), length_multiple)
  U = bucket(max(len(p) + len(r.tokens) for p, r in zip(teacher_prompts, rows)), length_multiple)
  taught = any(c is not None for c in contexts)
  zeros = lambda n, dtype=np.int32: np.zeros((B, n), dtype)
  batch = TrainBatch(student_BT=np.full((B, T), chat.pad_token, np.int32), teacher_BT=np.full((B, U if taught else length_multiple), chat.pad_token, np.int32),
                     student_pos_BR=zeros(R), teacher_pos_BR=zeros(R), response_BR=zeros(R), weight_BR=zeros(R, np.float32),
                     advantage_B=advantage_B, distill_B=np.array([c is not None and v for c, v in zip(contexts, valid)], np.float32),
                     logp_rollout_BR=zeros(R, np.float32), logp_old_BR=zeros(R, np.float32))
  for b, r in enumerate(rows):
    P, n = len(r.prompt_tokens), len(r.tokens)
    batch.student_BT[b, :P + n] = r.prompt_tokens + r.tokens
    batch.student_pos_BR[b, :n] = np.arange(P - 1, P - 1 + n)
    batch.response_BR[b, :n], batch.logp_rollout_BR[b, :n] = r.tokens, r.logp
    batch.weight_BR[b, :n] = float(valid[b])
    if taught:
      teacher = teacher_prompts[b]
      batch.teacher_BT[b, :len(teacher) + n] = teacher + r.tokens
      batch.teacher_pos_BR[b, :n] = np.arange(len(teacher) - 1, len(teacher) - 1 + n)
  student_tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in rows)
  metrics = {"data/dropped": float(B - sum(valid)), "data/teacher_share": float(batch.distill_B.mean()), "data/teacher_shortened": float(shortened),
             "data/solution_share": float(np.mean([c is not None and bool(c.solution) for c in contexts])),
             "data/useful_tokens": student_tokens / (B * T)}
  return Packed(batch, contexts, metrics)
