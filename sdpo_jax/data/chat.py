"""Turns text into tokens and back: the tokenizer, its chat template, and special tokens in text.

Text that people, programs or models wrote (a problem, a feedback, a demonstration) may contain
`<|im_end|>` or `</think>`. Wherever a special or added token of the tokenizer occurs in such text,
a space is put after its first character. It is then tokenised as ordinary characters and cannot
end a turn. Text without them goes through the template untouched.

Models that think do so between tags (`thought.py`). Who writes the opening tag differs: the model
itself, or the template at the end of the prompt (which may also close the block, so that there is
no thought). Where it is the template, `response_text` puts the tag in front of the response:
whoever reads the text then sees whether the thought has ended.
"""

import os
import re

import jinja2
import transformers

from sdpo_jax import thought
from sdpo_jax.errors import SettingError


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
    # By reader: rendering a prompt takes as long as decoding a response.
    self._opened: dict[bool, str] = {}
    ends = [token for token in (tokenizer.eos_token_id, *eos_ids) if token is not None]
    self.stop_tokens = tuple(dict.fromkeys(ends))  # each once, in this order
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # The longest first: a special token may begin with another one.
    special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    self._special = re.compile("|".join(re.escape(s) for s in special if len(s) > 1))

  @property
  def pad_token(self) -> int:
    pad = self.tokenizer.pad_token_id
    return self.stop_tokens[0] if pad is None else pad

  def neutral(self, text: str) -> str:
    """Returns the text with its special tokens made ordinary by a space."""
    return self._special.sub(lambda match: match[0][0] + " " + match[0][1:], text)

  def prompt_tokens(self, messages: list[dict[str, str]], *, teacher: bool = False) -> list[int]:
    """Returns the tokens of a conversation and of the header of the assistant's turn.

    teacher: the prompt is read by the teacher, not by the policy.
    """
    return self.encode(self._render(messages, teacher=teacher))

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text in which special tokens are meant as such."""
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def _render(self, messages: list[dict[str, str]], *, teacher: bool, header: bool = True) -> str:
    safe = [message | {"content": self.neutral(message["content"])} for message in messages]
    return self.fill(safe, teacher=teacher, header=header)

  def fill(
    self, messages: list[dict[str, str]], *, teacher: bool = False, header: bool = True
  ) -> str:
    """Fills in the template with texts as they are: special tokens in them are meant as such.

    header: that of the assistant's turn comes last.
    SettingError where the template refuses the conversation.
    """
    try:
      return self.tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=header,
        enable_thinking=self.teacher_thinking if teacher else self.thinking,
      )
    except jinja2.TemplateError as error:
      roles = ", ".join(message["role"] for message in messages)
      raise SettingError(
        f"the chat template of config.model.path={self.tokenizer.name_or_path!r} refuses a "
        f"conversation of {roles}: {error}"
      ) from error

  def check(self, messages: list[dict[str, str]]) -> None:
    """Raises SettingError unless policy and teacher can read every message of a conversation.

    A template may refuse a role, or leave its text out without a word.
    """
    for teacher in (False, True):
      rendered = _without_space(self._render(messages, teacher=teacher))
      for message in messages:
        # templates cut thoughts out of the assistant's earlier turns, which is right
        is_kept = _without_space(self.neutral(message["content"])) in rendered
        if not is_kept and message["role"] != "assistant":
          raise SettingError(
            f"the chat template of config.model.path={self.tokenizer.name_or_path!r} leaves out "
            f"the text of the {message['role']} message: nobody would read it"
          )

  def text_tokens(self, text: str) -> list[int]:
    """Returns the tokens of a text that stands in no template."""
    return self.encode(self.neutral(text))

  def response_text(self, tokens: list[int], *, teacher: bool = False) -> str:
    """Returns a response as the environment reads it: without its stop token.

    It begins with the tag of a thought that the template has opened. teacher: the prompt was read
    as the teacher reads it.
    """
    if tokens and tokens[-1] in self.stop_tokens:
      tokens = tokens[:-1]
    return self._opened_thought(teacher) + self.plain_text(tokens)

  def plain_text(self, tokens: list[int]) -> str:
    """Returns the text of tokens, special ones included."""
    return self.tokenizer.decode(
      tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def _opened_thought(self, teacher: bool) -> str:
    """Returns the end of every prompt from an opening tag on; "" where none is left open."""
    if teacher not in self._opened:
      self._opened[teacher] = thought.opened(self._header(teacher))
    return self._opened[teacher]

  def _header(self, teacher: bool) -> str:
    """Returns what the template writes before the assistant's answer to a question."""
    question = {"role": "user", "content": "?"}
    try:
      text = self._render([question], teacher=teacher)
      before = self._render([question], teacher=teacher, header=False)
    except SettingError:  # a template may demand a system message
      conversation = [{"role": "system", "content": "?"}, question]
      text = self._render(conversation, teacher=teacher)
      before = self._render(conversation, teacher=teacher, header=False)
    return text[len(os.path.commonprefix([text, before])) :]

  def token_strings(self, tokens: list[int]) -> list[str]:
    """Returns the text of each token by itself."""
    return [self.tokenizer.decode([token]) for token in tokens]


def _without_space(text: str) -> str:
  """Returns the text without any white space, of which templates take some away."""
  return "".join(text.split())
