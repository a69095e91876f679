"""The records that files hand to each other. Imports no jax: environments and judges use it too.

Axis letters, used as name suffixes wherever the order of axes matters:

  B  rows of a batch (one row = one response)     N, K, H  query heads, key-value heads, head size
  T  tokens of a padded row                       F        feed-forward width
  R  response positions                           V, M     vocabulary, kept part of it (top M)
  S  key positions of a cache                     L        layers
  D  model width (E: the teacher's, if different) X        any leading axes, flattened
  Q, G  questions, responses per question (B = Q x G, question first)
  C  packs of a batch                             P        rows of packed texts in a pack

Log-probabilities and divergences are in nats.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np


class Status(enum.Enum):
  SCORED = "scored"  # judged, right or wrong
  TIMEOUT = "timeout"  # the response's own program ran out of time: judged wrong
  ENV_FAILED = "env_failed"  # our fault, not the model's: dropped and counted, never trained on


@dataclasses.dataclass(frozen=True)
class Task:
  """One question. `id` is unique within its dataset; `split` names the split it belongs to."""

  id: str
  prompt: str  # what the user says
  system: str | None = None  # system message, if the task has one
  # a reference response; only methods that ask for it may read it
  solution: str | None = None
  split: str = "train"
  # what the judge needs: tests, answers
  data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Feedback:
  """What an environment says back about one response."""

  reward: float  # in [0, 1]
  text: str  # what the teacher may read; "" when there is nothing to say
  status: Status = Status.SCORED


@dataclasses.dataclass
class Rollout:
  """One sampled response and everything known about it. Host side."""

  task: Task
  prompt_tokens: list[int]
  tokens: list[int]  # the response, with its stop token if it produced one
  logp: list[float]  # nats, as the sampler reported them, one per token
  finish_reason: str  # "stop" | "length"
  text: str  # the response as text, without the stop token
  feedback: Feedback
  # what else might have been said to this question
  alternatives: list["Alternative"] = dataclasses.field(default_factory=list)
  # generated to find them and to imagine their feedback; what a question's attempts share, its
  # first failed one bears
  extra_tokens: int = 0
  extra_calls: int = 0  # judged for them


@dataclasses.dataclass(frozen=True)
class Alternative:
  """Another response to the question of a failed attempt, judged; never trained on. Of a second model, its tokens are that one's."""

  rollout: Rollout
  source: str  # samples | model | branches | siblings
  # the feedback that the model imagined for it and the teacher reads; None: it reads the judge's
  imagined: str | None = None


class Rows(NamedTuple):
  """Texts packed into rows: several a row, told apart by segment (1, 2, ...; 0 is padding), positions counted from each start.

  Texts that begin alike may share their beginning: it stands once in the row, a segment of its own, and the rest of each text, a segment too,
  names it as its prefix, sees it as if it stood before it, and counts its positions on from it.
  """

  token_CPT: np.ndarray  # int32
  segment_CPT: np.ndarray  # int32
  position_CPT: np.ndarray  # int32
  # int32: the segment that this one continues, 0 for none; None: no text of the batch shares
  # anything
  prefix_CPT: np.ndarray | None
  # int32: column, among the pack's P x T, whose logits predict response token x, which is the next
  # column's
  at_CX: np.ndarray


class Counterfactual(NamedTuple):
  """One more reading of a batch's responses: by a teacher that is told what alternatives would have received."""

  # prompt with feedback and notes, then the SAME response at the same x as in the batch
  teacher: Rows
  # float32 >= 0: of the divergence from this reading; 0: nothing is told, no row holds this
  # response
  weight_B: np.ndarray


class TrainBatch(NamedTuple):
  """What one training step reads. A NamedTuple is already a pytree, so this file needs no jax.

  Responses stand at the same column r in every *_BR array, padded on the right: a few bytes a token. What costs (the decoder, the
  vocabulary) runs on packed rows and on the response tokens alone. A pack holds B / C consecutive responses and numbers its columns and
  tokens by itself, so that packs can go to different micro-batches and devices; all packs have the same shapes.
  """

  student: Rows  # prompt then response
  teacher: Rows  # prompt with feedback, then the SAME response at the same x
  # int32: response token r of row b is token start_B[b] + r of its pack
  start_B: np.ndarray
  response_BR: np.ndarray  # int32: the tokens being scored
  # float32 >= 0: 0 marks padding, tool output and dropped rows; only what weighs something is
  # packed
  weight_BR: np.ndarray
  advantage_B: np.ndarray  # float32
  # float32: 0 where the teacher has nothing to show: no row of its then holds this response
  distill_B: np.ndarray
  logp_rollout_BR: np.ndarray  # float32, nats: as the sampler reported it
  logp_old_BR: np.ndarray  # float32, nats: the trainer's, before this batch's updates
  counterfactuals: tuple[Counterfactual, ...] = ()


class Completion(NamedTuple):
  """What an engine returns for one sample: tokens (the stop token included) and their log-probabilities in nats."""

  prompt_index: int
  sample_index: int
  tokens: list[int]
  logp: list[float]
  finish_reason: str  # "stop" | "length"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. temperature 0 is greedy; log-probabilities are those at the temperature, before top_p cuts."""

  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  stop_tokens: tuple[int, ...] = ()


class Ratio(NamedTuple):
  """A metric as a pair, so that micro-batches and hosts add up exactly and nobody averages averages."""

  total: Any
  count: Any

  @property
  def mean(self) -> float | None:
    """None where nothing was counted: a missing value is left out, never NaN."""
    return float(self.total) / float(self.count) if float(self.count) else None
