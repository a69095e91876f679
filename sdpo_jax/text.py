"""Cleans and bounds texts that a model will read."""

import re
import unicodedata

MAX_CHARS = 2000  # of one feedback
# What stands before the first message of an episode where its reader gets to know a skill.
SKILL_TEMPLATE = "Here is what is known:\n{text}\n\n"

_ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+")
_MARKERS = re.compile(
  r"<[|\uff5c]|[|\uff5c]>|\[/?INST\]|<</?SYS>>|"
  r"\[/?THINK\]|◁/?think▷|"
  r"</?(s|start_of_turn|end_of_turn|(seed:|mm:)?think|thinking|thought|tool_call|tool_response|bos|"
  r"eos|pad|unk)>",
  re.IGNORECASE,
)
# Unicode categories: control, format, surrogate, private use, unassigned, line and paragraph ends
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(text: str) -> str:
  """Returns the text made safe to show; what is already clean stays as it is.

  Newline and tab are the only control characters left, the others are U+FFFD. No chat marker stays
  whole, and no address that changes from run to run.
  """
  text = text.replace("\r\n", "\n")
  # most texts pass this quick look
  if not text.isascii() or not text.replace("\n", "").replace("\t", "").isprintable():
    text = "".join(
      "\ufffd" if c not in "\n\t" and unicodedata.category(c) in _UNSAFE else c for c in text
    )
  # A space after the first character breaks a marker, and a broken marker cannot join its
  # neighbours into a new one.
  broken = _MARKERS.sub(lambda match: match[0][0] + " " + match[0][1:], text)
  return _ADDRESS.sub("0x...", broken)


def cut(text: str, limit: int) -> str:
  """Returns at most `limit` characters of the text: its beginning and its end.

  Errors and answers tend to stand at the ends.
  """
  if len(text) <= limit:
    return text
  mark = " ... "
  head_chars = (limit - len(mark)) * 2 // 3
  tail_chars = limit - len(mark) - head_chars
  return text[:head_chars] + mark + text[len(text) - tail_chars :]
