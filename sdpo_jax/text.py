"""Cleaning and bounding of texts that a model will read."""

import re
import unicodedata

MAX_CHARS = 2000  # of one feedback

_ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+")


_MARKERS = re.compile(
  r"<[|\uff5c]|[|\uff5c]>|\[/?INST\]|<</?SYS>>|"
  r"</?(s|start_of_turn|end_of_turn|think|tool_call|tool_response|bos|eos|pad|unk)>",
  re.IGNORECASE,
)


def clean(text: str) -> str:
  """Text that is safe to show: newline and tab are its only control characters, and no chat marker is left whole."""
  text = text.replace("\r\n", "\n")
  if not text.isascii() or not text.replace("\n", "").replace("\t", "").isprintable():
    text = "".join(
      "\ufffd" if c not in "\n\t" and unicodedata.category(c) in _UNSAFE else c for c in text
    )
  # a space after the first character breaks a marker, and a broken marker cannot join its
  # neighbours into a new one
  return _ADDRESS.sub("0x...", _MARKERS.sub(lambda m: m[0][0] + " " + m[0][1:], text))


_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def cut(text: str, limit: int) -> str:
  """The text's beginning and end, at most `limit` characters: errors and answers tend to stand at the ends."""
  if len(text) <= limit:
    return text
  mark = " ... "
  head = (limit - len(mark)) * 2 // 3
  return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]
