"""What the local engine works on: a prompt in the cache, a row that goes on from it, a parked row.

A text lies in two lists of pages. The prompt's tokens, but for the last one, lie in pages that all
its samples share. The rest is the row's own: the prompt's last token, which each row reads for
itself so that the model says what comes next, and then what is sampled.

  shared pages   p0 p1 p2 ... p(n-2)
  own pages                          p(n-1) t0 t1 t2 ...

When a row goes on with one that has ended (the next turn of a conversation), the shared pages stay
those of the first turn, and all that came later stands in own ones.
"""

import bisect
from collections.abc import Callable
import dataclasses

import numpy as np

from sdpo_jax.records import Completion, Request


@dataclasses.dataclass(eq=False)
class Prompt:
  """A prompt in a shard's cache."""

  tokens: tuple[int, ...]
  pages: list[int] = dataclasses.field(default_factory=list)  # shared ones
  rows: int = 0  # that read it, or are parked
  is_read: bool = False

  @property
  def length(self) -> int:
    """Tokens in the shared pages: all but the last."""
    return len(self.tokens) - 1


@dataclasses.dataclass(eq=False)
class Parked:
  """A row that has ended and may be gone on with."""

  place: tuple  # key and sample of its completion
  text: list[int]  # the prompt and what was sampled
  prompt: Prompt
  pages: list[int]  # own ones
  written: int  # tokens in them; the last one of the text is not

  def is_beginning_of(self, prompt: list[int]) -> bool:
    """Says whether a request with this prompt may go on here."""
    count = len(self.text)
    if count >= len(prompt) or prompt[count - 1] != self.text[-1]:
      return False  # of most texts, without a look at their thousands of tokens
    return prompt[:count] == self.text


@dataclasses.dataclass(eq=False)
class Row:
  """One sample while it is decoded."""

  request: Request
  sample_index: int
  prompt: Prompt
  given: list[int]  # the tokens of the request's prompt that do not lie in shared pages
  pages: list[int]  # own ones
  written: int  # tokens in them
  dice: np.random.Philox
  uniforms: np.ndarray  # drawn so far, one a token
  tokens: list[int] = dataclasses.field(default_factory=list)  # sampled
  logp: list[float] = dataclasses.field(default_factory=list)
  entropy: list[float] = dataclasses.field(default_factory=list)  # empty where nobody asks for it
  has_stop_string: bool = False

  @classmethod
  def begin(cls, request: Request, sample_index: int, cached: Prompt | Parked) -> "Row":
    """Returns a row that goes on from a prompt, or takes over the pages of a row that has ended."""
    if isinstance(cached, Parked):
      prompt, pages, written = cached.prompt, cached.pages, cached.written
      given = request.prompt[prompt.length :]
    else:
      prompt, pages, written = cached, [], 0
      given = [prompt.tokens[-1]]
    dice = np.random.Philox(key=[request.seed, sample_index])
    uniforms = np.zeros(0, np.float32)
    return cls(request, sample_index, prompt, given, pages, written, dice, uniforms)

  @property
  def left(self) -> int:
    """How many tokens it may still sample."""
    return self.request.sampling.max_new_tokens - len(self.tokens)

  @property
  def most_written(self) -> int:
    """How many tokens its own pages may come to hold; the last token sampled is never written."""
    return len(self.given) + self.request.sampling.max_new_tokens - 1

  @property
  def last_token(self) -> int:
    """The last token of its text."""
    return self.tokens[-1] if self.tokens else self.given[-1]

  def uniform(self, count: int) -> np.ndarray:
    """Returns the numbers in [0, 1) that decide the next tokens, float32.

    They come from the generator's raw bits, which no version of numpy changes.
    """
    first = len(self.tokens)
    while len(self.uniforms) < first + count:
      bits = self.dice.random_raw(64) >> np.uint64(40)
      self.uniforms = np.append(self.uniforms, bits.astype(np.float32) * np.float32(2**-24))
    return self.uniforms[first : first + count]

  def add(self, tokens: list[int], logp: list[float], entropy: list[float]) -> None:
    """Adds what was sampled. The step that samples a token writes the one before it."""
    self.tokens += tokens
    self.logp += logp
    self.entropy += entropy
    self.written += len(tokens)

  def cut_at_stop_string(self, text_of: Callable[[list[int]], str]) -> None:
    """Ends the row at the token that completes its first stop string, if one stands in its text."""

    def has_one(count: int) -> bool:
      text = text_of(self.tokens[:count])
      return any(stop in text for stop in self.request.sampling.stop_strings)

    if has_one(len(self.tokens)):
      length = bisect.bisect_left(range(len(self.tokens)), True, key=has_one)
      self.written -= len(self.tokens) - length
      del self.tokens[length:], self.logp[length:], self.entropy[length:]
      self.has_stop_string = True

  def finish_reason(self) -> str | None:
    """Returns why nothing more is sampled; None while it lives."""
    if self.has_stop_string:
      return "stop"
    if self.tokens and self.tokens[-1] in self.request.sampling.stop_tokens:
      return "stop"
    return "length" if self.left <= 0 else None

  def completion(self, version: int) -> Completion:
    """Returns what it has become, once it has ended. version: of the weights."""
    key, reason = self.request.key, self.finish_reason()
    entropy = self.entropy if self.request.sampling.entropy else None
    return Completion(key, self.sample_index, self.tokens, self.logp, reason, version, entropy)

  def parked(self) -> Parked:
    """Returns what is kept of it for a request that goes on with its text."""
    place = self.request.key, self.sample_index
    text = [*self.prompt.tokens[:-1], *self.given, *self.tokens]
    return Parked(place, text, self.prompt, self.pages, self.written)
