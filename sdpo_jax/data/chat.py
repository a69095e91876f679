"""Turns text into tokens and back: the tokenizer, its chat template, and special tokens in text.

Text that people, programs or models wrote (a problem, a feedback, a demonstration) may contain
`<|im_end|>` or `</think>`. Wherever a special or added token of the tokenizer occurs in such text,
a space is put after its first character. It is then tokenised as ordinary characters and cannot
end a turn. Text without them goes through the template untouched.
"""

import re

import transformers


def load_tokenizer(path: str):
  """Returns the fast tokenizer of a Hugging Face directory or hub id.

  ValueError if there is none, or if it has no chat template.
  """
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(
      f"model.path={path!r} holds no tokenizer that transformers can load: {reason}"
    ) from error
  if not tokenizer.chat_template:
    raise ValueError(f"the tokenizer of model.path={path!r} has no chat template")
  return tokenizer


class Chat:
  """Renders messages for one tokenizer, and reads its tokens."""

  def __init__(
    self,
    tokenizer,
    *,
    thinking: bool = False,
    teacher_thinking: bool = False,
    eos_ids: tuple[int, ...] = (),
  ):
    """Prepares the rule for special tokens in text.

    thinking, teacher_thinking: passed as `enable_thinking` to the chat template, for the policy's
      prompts and for the teacher's. Qwen3's template knows it, others ignore it.
    eos_ids: tokens that end a response beside the tokenizer's own end of turn. The checkpoint's
      generation config names them.
    """
    self.tokenizer = tokenizer
    self.thinking = thinking
    self.teacher_thinking = teacher_thinking
    ends = [token for token in (tokenizer.eos_token_id, *eos_ids) if token is not None]
    self.stop_tokens = tuple(dict.fromkeys(ends))  # each once, in this order
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # The longest first: a special token may begin with another one.
    special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    self._special = re.compile("|".join(re.escape(s) for s in special if len(s) > 1))

  @property
  def pad_token(self) -> int:
    pad = self.tokenizer.pad_token_id
    return self.tokenizer.eos_token_id if pad is None else pad

  def neutral(self, text: str) -> str:
    """Returns the text with its special tokens made ordinary by a space."""
    return self._special.sub(lambda match: match[0][0] + " " + match[0][1:], text)

  def prompt_tokens(self, messages: list[dict[str, str]], *, teacher: bool = False) -> list[int]:
    """Returns the tokens of a conversation and of the header of the assistant's turn.

    teacher: the prompt is read by the teacher, not by the policy.
    """
    safe = [message | {"content": self.neutral(message["content"])} for message in messages]
    text = self.tokenizer.apply_chat_template(
      safe,
      tokenize=False,
      add_generation_prompt=True,
      enable_thinking=self.teacher_thinking if teacher else self.thinking,
    )
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def text_tokens(self, text: str) -> list[int]:
    """Returns the tokens of a text that stands in no template."""
    return self.tokenizer(self.neutral(text), add_special_tokens=False)["input_ids"]

  def response_text(self, tokens: list[int]) -> str:
    """Returns a response as the environment reads it: without its stop token."""
    if tokens and tokens[-1] in self.stop_tokens:
      tokens = tokens[:-1]
    return self.tokenizer.decode(
      tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def token_strings(self, tokens: list[int]) -> list[str]:
    """Returns the text of each token by itself."""
    return [self.tokenizer.decode([token]) for token in tokens]
