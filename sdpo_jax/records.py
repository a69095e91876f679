"""The records that files hand to each other. Imports no jax: environments and judges use it too.

Axis letters are name suffixes wherever the order of axes matters:

  B     rows of a batch (one row = one response)
  Q, G  questions, responses per question (B = Q x G, question first); also readings of a response
  T     tokens of a padded row
  R     response positions
  S     key positions of a cache; seeds
  C     packs of a batch; columns of a page
  P     rows of packed texts in a pack; tokens of a padded prompt
  X     any leading axes, flattened; response tokens of a pack
  D, E  model width; the teacher's, if different
  N, K  query heads, key-value heads
  J     query heads of one key-value head
  H     head size
  F     feed-forward width
  L     layers
  V, M  vocabulary, kept part of it (top M); also rows that read a page
  Z     shards of rows, each with pages of its own
  W     pages of a pool of keys and values
  Y     blocks of tokens that are read into pages

A digit is an axis of that length. Log-probabilities and divergences are in nats.
"""

import dataclasses
import enum
import itertools
import math
from typing import Any, Iterator, NamedTuple

# numpy on the host, jax on the device. This file imports neither's arrays by name.
Array = Any


class Status(enum.Enum):
  """How the judgement of a response ended."""

  SCORED = "scored"  # judged, right or wrong
  TIMEOUT = "timeout"  # the response's own program ran out of time: judged wrong
  ENV_FAILED = "env_failed"  # our fault, not the model's: dropped and counted, never trained on


@dataclasses.dataclass(frozen=True)
class Task:
  """One question. `id` is unique within its dataset; `split` names the split it belongs to."""

  id: str
  prompt: str  # what the user says
  system: str | None = None  # system message, if the task has one
  solution: str | None = None  # a reference response; only methods that ask for it may read it
  split: str = "train"
  data: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the judge: tests, answers


@dataclasses.dataclass(frozen=True)
class Feedback:
  """What an environment says back about one response."""

  reward: float  # in [0, 1]
  text: str  # what the teacher may read; "" when there is nothing to say
  status: Status = Status.SCORED


class Turn(NamedTuple):
  """What a world says to one message of the policy."""

  observation: str  # what the policy reads next
  reward: float  # of the episode, in [0, 1]; what counts is that of the last turn
  done: bool
  valid: bool = True  # False: the message held no action that the world allows


@dataclasses.dataclass
class Rollout:
  """One sampled response and everything known about it. Host side."""

  task: Task
  prompt_tokens: list[int]
  # What the policy sampled, with a stop token where it produced one; what others say between turns
  # stands in `sampled` alone
  tokens: list[int]
  logp: list[float]  # nats, one per token, as the engine reported them
  finish_reason: str  # "stop" | "length"; of an episode see episodes.py
  text: str  # the response as text, without the stop token
  feedback: Feedback
  # nats, one per token, of the policy over the whole vocabulary; None: nobody asked for it
  entropy: list[float] | None = None
  alternatives: list["Alternative"] = dataclasses.field(default_factory=list)
  # Tokens generated beside the response and not trained on, and the responses among them: what
  # alternatives, their imagined feedback and a reflection cost. What the attempts at a question
  # share is counted at its first failed one.
  extra_tokens: int = 0
  extra_calls: int = 0
  # The parts of the response as the engine returned them, in order, which make up `tokens`. None:
  # the response comes from a file, or nothing sampled it.
  sampled: list["Segment"] | None = None
  # What a world said to each part, where the response is an episode; an episode that was lost may
  # lack the last one
  turns: list[Turn] | None = None
  # What the policy wrote of the episode in hindsight; None: it was not asked
  reflection: str | None = None

  @property
  def is_judged(self) -> bool:
    """Tells whether there is a verdict, and so a reward that may be trained on."""
    judged = self.feedback.status is not Status.ENV_FAILED
    return judged and math.isfinite(self.feedback.reward)

  def turn_by_turn(self) -> Iterator[tuple["Segment", Turn | None, float]]:
    """Yields each part of an episode with the world's answer to it and the reward so far.

    None: the world was not asked any more, or did not answer.
    """
    reward = 0.0
    answers = itertools.chain(self.turns or (), itertools.repeat(None))
    for segment, answer in zip(self.sampled or (), answers):
      reward = reward if answer is None else answer.reward
      yield segment, answer, reward

  @classmethod
  def of(
    cls, task: Task, prompt: list[int], completion: "Completion", text: str, feedback: Feedback
  ) -> "Rollout":
    """Returns a response that was sampled in one piece. text: the completion's."""
    c = completion
    return cls(
      task,
      prompt,
      list(c.tokens),
      list(c.logp),
      c.finish_reason,
      text,
      feedback,
      entropy=c.entropy,
      sampled=[Segment(0, c)],
    )


@dataclasses.dataclass(frozen=True)
class Alternative:
  """Another response to the question of a failed attempt, judged and never trained on.

  The tokens of a second model's response are those of its own tokenizer.
  """

  rollout: Rollout
  source: str  # samples | model | branches | beams | siblings
  # The feedback that the teacher reads instead of the judge's: the policy's own, or a control's.
  imagined: str | None = None


class Rows(NamedTuple):
  """Texts packed into rows, several a row.

  They are told apart by segment (1, 2, ...; 0 is padding), with positions counted from each start.
  Texts that begin alike may share their beginning, which then stands once in the row, as a segment
  of its own. The rest of each text is a segment that names the shared one as its prefix: it attends
  to it and continues its positions.
  """

  token_CPT: Array  # int32
  segment_CPT: Array  # int32
  position_CPT: Array  # int32
  # int32: the segment that this one continues, 0 for none. None: no text of the batch shares
  # anything.
  prefix_CPT: Array | None
  # int32: index into the flattened P x T columns; its logits predict response token x, which stands
  # in the next column
  at_CX: Array


class Scored(NamedTuple):
  """What a teacher that lives elsewhere says of response token x, at entries it was asked about."""

  index_CXM: Array  # int32: the policy's likeliest tokens, as of before the batch's updates
  logp_CXM: Array  # float32, nats: the teacher's there
  logp_CX: Array  # float32, nats: the teacher's at the response token


class Reading(NamedTuple):
  """One reading of a batch's responses by the teacher, under prompts that the policy never sees."""

  rows: Rows  # prompt with context, then the SAME response at the same x as in the batch
  # float32 >= 0: of the divergence from this reading; 0: the teacher has nothing to show, and no
  # row holds this token
  weight_BR: Array
  scored: Scored | None = None  # None: the teacher lives here and reads the rows

  @property
  def has_BR(self) -> Array:
    """Tells which tokens are read."""
    return self.weight_BR > 0


class TrainBatch(NamedTuple):
  """What one training step reads. A NamedTuple is already a pytree, so this file needs no jax.

  Responses stand at the same column r in every *_BR array, padded on the right: a few bytes a
  token. What costs (the decoder, the vocabulary) runs on packed rows and on the response tokens
  alone. A pack holds B / C consecutive responses and numbers its columns and tokens by itself, so
  that packs can go to different micro-batches and devices. All packs have the same shapes.
  """

  policy: Rows  # prompt then response
  readings: tuple[Reading, ...]  # the plain one first, then those that the method adds
  start_B: Array  # int32: response token r of row b is token start_B[b] + r of its pack
  response_BR: Array  # int32: the tokens being scored
  weight_BR: Array  # float32 >= 0: 0 marks padding, tool output and dropped rows
  advantage_BR: Array  # float32: of the token's response, or of its turn
  # float32: 1 gives the response to the divergence, 0 to the surrogate; read where the method's
  # policy_share is "routed"
  route_B: Array
  logp_rollout_BR: Array  # float32, nats: as the engine reported it
  logp_old_BR: Array  # float32, nats: the trainer's, before this batch's updates
  control: dict[str, Array]  # float32 scalars that the host decides (objectives/control.py)
  # int32: the turn of each scored token, and its index within the turn; None: one turn a response
  turn_BR: Array | None = None
  place_BR: Array | None = None
  # What is found once a batch, before its updates, where a part of the method reads it; else None.
  credit_BR: Array | None = None  # float32 in [-1, 1]: c of each token (objectives/cti.py)
  logp_ref_BR: Array | None = None  # float32, nats: under the weights that the run started from


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. Log-probabilities are those at the temperature, before any cut or bias."""

  max_new_tokens: int
  temperature: float = 1.0  # 0 is greedy
  top_p: float = 1.0
  stop_tokens: tuple[int, ...] = ()
  top_k: int = 0  # 0: all tokens
  min_p: float = 0.0  # least probability, as a part of the likeliest token's
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what its logit is raised by)
  banned_tokens: tuple[int, ...] = ()  # never sampled
  # Texts that end a response as soon as they stand in it; its last token is the one with their end.
  stop_strings: tuple[str, ...] = ()
  # False: nobody reads the log-probabilities, and an engine that cannot give them leaves them out
  wants_logp: bool = True
  entropy: bool = False  # whether completions come with the entropy at each token
  beams: int = 0  # the width of a beam search for the likeliest completions; 0: they are sampled


class Request(NamedTuple):
  """What an engine is asked for: n samples of what comes after a prompt."""

  key: Any  # comes back with each completion
  prompt: list[int]
  n: int
  sampling: Sampling
  seed: int  # uint32


class Completion(NamedTuple):
  """What an engine returns for one sample."""

  key: Any  # the request's
  sample_index: int
  tokens: list[int]  # the stop token included
  logp: list[float]  # nats
  finish_reason: str  # "stop" | "length"
  version: int = 0  # of the weights that sampled it
  entropy: list[float] | None = None  # nats, at each token; None where it was not asked for


class Segment(NamedTuple):
  """A part of a response as the engine returned it: all of it, or one turn of a conversation."""

  start: int  # index of its first token among those of the response
  completion: Completion
  # What stands between it and the part before it (or the prompt) and was not sampled: a missing end
  # of turn, what the chat template writes, and somebody's message.
  before: tuple[int, ...] = ()
  # All that it was sampled after, where each turn has a prompt of its own and so a text of its own
  # (rows as turns); empty: it goes on with the part before it.
  prompt: tuple[int, ...] = ()


LEAST = 1e-6  # the end of a Histogram's bin 0
DECADES = 8  # from there to the end of its last bin


class Histogram(NamedTuple):
  """A metric as counts of values >= 0, of which quantiles are taken.

  Micro-batches and hosts add up exactly. The bins are equally wide on a logarithmic scale over
  DECADES decades, so that their number says how fine they are.
  """

  count_X: Any  # whole numbers; the last bin holds all that lies above it too

  def quantile(self, share: float) -> float | None:
    """Returns the end of the bin that holds the quantile, at most one bin above it.

    A bin's end is a sixth above its beginning with 128 bins, and 1 % with 2048. None where nothing
    was counted.
    """
    total, below = sum(int(count) for count in self.count_X), 0
    for i, count in enumerate(self.count_X):
      below += int(count)
      if total and below >= share * total:
        return LEAST * bin_ratio(len(self.count_X)) ** i
    return None


def bin_ratio(bins: int) -> float:
  """Returns the end of a bin of a Histogram of so many, as a multiple of its beginning."""
  return 10 ** (DECADES / bins)


class Ratio(NamedTuple):
  """A metric as a pair: micro-batches and hosts add up exactly, and nobody averages averages."""

  total: Any
  count: Any

  @property
  def mean(self) -> float | None:
    """None where nothing was counted: a missing value is left out, never NaN."""
    return float(self.total) / float(self.count) if float(self.count) else None
