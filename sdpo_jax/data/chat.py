"""Text to tokens and back: the tokenizer, the chat template, and the rule for special tokens inside
text.

Rule: text that people, programs or models wrote (a problem, a feedback, a demonstration) may
contain `<|im_end|>` or `</think>`. Every special or added token of the tokenizer that occurs in
such text gets a space after its first character, so that it is tokenised as ordinary characters and
cannot end a turn. Text without them goes through the template untouched.
"""

import re

import transformers


def load_tokenizer(path: str):
  """A fast tokenizer from a Hugging Face directory or hub id; ValueError if it has no chat
  template.
  """
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"model.path={path!r} holds no tokenizer that transformers can load: {str(error).splitlines()[0]}"
    ) from error
  if not tokenizer.chat_template:
    raise ValueError(f"the tokenizer of model.path={path!r} has no chat template")
  return tokenizer


class Chat:
  """Renders messages for one tokenizer.

  thinking, teacher_thinking: passed to templates that know `enable_thinking` (Qwen3), for the
    policy's prompts and the teacher's; others ignore it.
  eos_ids: tokens that end a response beside the tokenizer's own end of turn (the checkpoint's
    generation config names them).
  """

  def __init__(
    self,
    tokenizer,
    *,
    thinking: bool = False,
    teacher_thinking: bool = False,
    eos_ids: tuple[int, ...] = (),
  ):
    self.tokenizer, self.thinking, self.teacher_thinking = tokenizer, thinking, teacher_thinking
    self.stop_tokens = tuple(
      dict.fromkeys(t for t in (tokenizer.eos_token_id, *eos_ids) if t is not None)
    )
    special = sorted(
      {t.content for t in tokenizer.added_tokens_decoder.values()}
      | set(tokenizer.all_special_tokens),
      key=len,
      reverse=True,
    )
    self._special = re.compile("|".join(re.escape(s) for s in special if len(s) > 1))

  @property
  def pad_token(self) -> int:
    pad = self.tokenizer.pad_token_id
    return self.tokenizer.eos_token_id if pad is None else pad

  def neutral(self, text: str) -> str:
    """The text with its special tokens made ordinary (the rule above)."""
    return self._special.sub(lambda m: m.group()[0] + " " + m.group()[1:], text)

  def prompt_tokens(self, messages: list[dict[str, str]], *, teacher: bool = False) -> list[int]:
    """Tokens of the conversation and of the header of the assistant's turn. teacher: the reader is
    the teacher.
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
    return self.tokenizer(self.neutral(text), add_special_tokens=False)["input_ids"]

  def response_text(self, tokens: list[int]) -> str:
    """The response as the environment reads it: without the stop token."""
    if tokens and tokens[-1] in self.stop_tokens:
      tokens = tokens[:-1]
    return self.tokenizer.decode(
      tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def token_strings(self, tokens: list[int]) -> list[str]:
    return [self.tokenizer.decode([t]) for t in tokens]
