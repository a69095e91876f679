"""The bodies of answers, in the form that OpenAI's and vLLM's clients read."""

import itertools
import time
from typing import Any
import uuid

import numpy as np

from sdpo_jax.data.chat import Chat
from sdpo_jax.engine.scoring import TextScores
from sdpo_jax.records import Completion, Sampling
from sdpo_jax.serve.fields import ChatFields


def plain(values: np.ndarray) -> list:
  """Returns float32 numbers as those with the fewest digits that read back as the same."""
  return np.asarray(values, np.float32).astype(str).astype(float).tolist()


class Writer:
  """Writes the answer to one request."""

  def __init__(self, chat: Chat, fields, prompt: list[int], sampling: Sampling):
    self.chat, self.fields, self.prompt, self.sampling = chat, fields, prompt, sampling
    self.is_chat = isinstance(fields, ChatFields)

  def body(
    self,
    model: str,
    completions: list[Completion],
    tops: list[TextScores | None],
    of_prompt: dict[str, Any],
  ) -> dict:
    """Returns the whole answer.

    tops: scores of each completion's tokens, where their likeliest entries are asked for.
    of_prompt: what every choice says of the prompt, or one that nothing was sampled for.
    """
    choices = []
    for completion, scores in zip(completions, tops, strict=True):
      choices.append(self._choice(len(choices), completion, scores) | of_prompt)
    written = sum(len(completion.tokens) for completion in completions)
    kind = "chat.completion" if self.is_chat else "text_completion"
    return {
      "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
      "object": kind,
      "created": int(time.time()),
      "model": model,
      "choices": choices,
      "usage": {
        "prompt_tokens": len(self.prompt),
        "completion_tokens": written,
        "total_tokens": len(self.prompt) + written,
      },
    }

  def _choice(self, index: int, completion: Completion, scores: TextScores | None) -> dict:
    text, stop_reason = self._text(completion)
    choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason}
    choice["stop_reason"] = stop_reason
    if self.is_chat:
      choice["message"] = {"role": "assistant", "content": text}
    else:
      choice["text"] = text
    choice["logprobs"] = None
    if self.fields.top_logprobs_of_samples is not None:
      write = self._chat_logprobs if self.is_chat else self._logprobs
      choice["logprobs"] = write(completion, scores)
    if self.fields.return_token_ids:
      choice["token_ids"] = completion.tokens
      choice["prompt_token_ids"] = self.prompt
    return choice

  def _text(self, completion: Completion) -> tuple[str, int | str | None]:
    """Returns the text, and the stop token or string of the request that ended it."""
    tokens, reason = completion.tokens, None
    if tokens and tokens[-1] in self.sampling.stop_tokens:
      last = tokens[-1]
      reason = last if last in self.fields.stop_token_ids else None
      tokens = tokens[:-1] if self.fields.skip_special_tokens else tokens
    text = self.chat.tokenizer.decode(
      tokens,
      skip_special_tokens=self.fields.skip_special_tokens,
      clean_up_tokenization_spaces=False,
    )
    if completion.finish_reason != "stop":
      return text, None
    stops = [stop for stop in self.fields.stop_strings if stop in text]
    if stops:
      reason = min(stops, key=text.index)
      keep = len(reason) if self.fields.include_stop_str_in_output else 0
      text = text[: text.index(reason) + keep]
    return text, reason

  def names(self, tokens: list[int]) -> list[str]:
    """Returns how tokens are called in log-probabilities."""
    if self.fields.return_tokens_as_token_ids:
      return [f"token_id:{token}" for token in tokens]
    return self.chat.token_strings(tokens)

  def _top(self, completion: Completion, scores: TextScores | None) -> list[dict[int, float]]:
    """Returns {token: log-probability} of each position: the sampled token and the likeliest."""
    logp = plain(np.array(completion.logp))
    top: list[dict[int, float]] = [{} for _ in logp]
    if scores is not None:
      for entries, tokens, values in zip(
        top, scores.top_token_XM.tolist(), plain(scores.top_logp_XM), strict=True
      ):
        entries.update(zip(tokens, values, strict=True))
    for entries, token, value in zip(top, completion.tokens, logp, strict=True):
      entries[token] = value  # as the engine says, which sampled it
    return top

  def _logprobs(self, completion: Completion, scores: TextScores | None) -> dict:
    names = self.names(completion.tokens)
    offsets = itertools.accumulate(map(len, names[:-1]), initial=0)
    top = self._top(completion, scores)
    return {
      "tokens": names,
      "token_logprobs": plain(np.array(completion.logp)),
      "top_logprobs": [dict(zip(self.names(list(x)), x.values(), strict=True)) for x in top],
      "text_offset": list(offsets) if names else [],
    }

  def _chat_logprobs(self, completion: Completion, scores: TextScores | None) -> dict:
    content = []
    for token, entries in zip(completion.tokens, self._top(completion, scores), strict=True):
      described = {t: self._described(t, value) for t, value in entries.items()}
      likeliest = sorted(described.values(), key=lambda entry: -entry["logprob"])
      most = self.fields.top_logprobs
      content.append(described[token] | {"top_logprobs": likeliest[:most]})
    return {"content": content}

  def _described(self, token: int, logp: float) -> dict:
    (name,) = self.names([token])
    return {"token": name, "logprob": logp, "bytes": list(name.encode(errors="replace"))}

  # ---- what is said of the prompt

  def prompt_logprobs(self, scores: TextScores) -> list[dict | None]:
    """Returns {id: {logprob, rank, decoded_token}} of each position; none of the first one.

    The rank is 1 for the likeliest entry; null for the prompt's token where it is not among them.
    """
    positions: list[dict | None] = [None]
    own = plain(scores.logp_X)
    top = zip(scores.top_token_XM.tolist(), plain(scores.top_logp_XM), strict=True)
    for token, logp, (tokens, values) in zip(self.prompt[1:], own, top, strict=True):
      entries: dict[str, dict] = {}
      for rank, (entry, value) in enumerate(zip(tokens, values, strict=True), 1):
        entries[str(entry)] = self._ranked(entry, value, rank)
      entries.setdefault(str(token), self._ranked(token, logp, None))
      positions.append(entries)
    return positions

  def _ranked(self, token: int, logp: float, rank: int | None) -> dict:
    (name,) = self.chat.token_strings([token])
    return {"logprob": logp, "rank": rank, "decoded_token": name}

  def id_logprobs(self, scores: TextScores) -> dict[str, list]:
    """Returns the log-probabilities of the ids that `prompt_logprob_ids` names."""
    lists = zip(plain(scores.logp_XM), self.fields.prompt_logprob_ids, strict=True)
    return {
      "prompt_id_logprobs": [values[: len(ids)] for values, ids in lists],
      "prompt_token_logprobs": plain(scores.logp_X),
    }
