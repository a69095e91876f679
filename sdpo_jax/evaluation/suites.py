"""Reads suites: the environments and splits that one evaluation goes over.

A file of suites has `get_suites(argument)`, which returns {name: suite}. A suite holds any of

  env         as config.env: the whole section, other settings at their defaults
  data, rollout
              changes to these sections of the configuration. With `env`, the sources of the
              configuration are not kept
  splits, questions, samples, greedy, temperature, top_p, keep_texts, base_logp
              as config.eval; splits are final_splits

What it does not hold is as in the configuration. Without a file there is one suite without a name:
the configuration itself.

Each split of a suite has one or two parts. The sampled one has `samples` responses a question, the
greedy one has one. At temperature 0 there is one greedy part, with `samples` responses.
"""

import re
from typing import Iterator, NamedTuple

from ml_collections import ConfigDict

from sdpo_jax.config import call_file, complete_parts, validate
from sdpo_jax.errors import did_you_mean

_SECTIONS = ("env", "data", "rollout")
_EVAL = (
  "splits",
  "questions",
  "samples",
  "greedy",
  "temperature",
  "top_p",
  "keep_texts",
  "base_logp",
)
_OWN_NAME = "config"  # in the names of files, of the suite without a name


class Part(NamedTuple):
  """What is sampled in one way from one split of a suite."""

  suite: str
  split: str
  decoding: str  # greedy | sampled
  metric: str  # begins the names of its metrics
  samples: int  # responses a question
  temperature: float
  top_p: float

  @property
  def name(self) -> str:
    """The name of its suite and split, as its files have it."""
    return f"{self.suite or _OWN_NAME}.{self.split}"

  @property
  def file(self) -> str:
    """The name of the file of its lines."""
    return f"{self.name}.{self.decoding}.jsonl"

  @property
  def has_entropy(self) -> bool:
    """Whether its tokens were sampled from the policy's own distribution."""
    return self.temperature == 1.0 and self.top_p == 1.0


class Suite(NamedTuple):
  """A configuration whose evaluation settings say what is asked, and its name; "": it has none."""

  name: str
  c: ConfigDict

  @property
  def splits(self) -> dict[str, str]:
    """{split: what asks for it}."""
    setting = f"suite {self.name}" if self.name else "config.eval.final_splits"
    return {split: setting for split in self.c.eval.final_splits}

  def parts(self) -> Iterator[Part]:
    """Yields its parts, split by split."""
    e = self.c.eval
    for split in self.splits:
      metric = f"eval/{self.name}.{split}" if self.name else f"eval/{split}"
      decoding = "sampled" if e.temperature else "greedy"
      yield Part(self.name, split, decoding, metric, e.samples, e.temperature, e.top_p)
      if e.greedy and e.temperature:
        yield Part(self.name, split, "greedy", f"{metric}.greedy", 1, 0.0, 1.0)


def read_suites(file_and_argument: str | None, c: ConfigDict) -> list[Suite]:
  """Returns the suites of a file over the configuration, or the configuration as the only one.

  ValueError that names the suite for what cannot be one.
  """
  if file_and_argument is None:
    return [Suite("", c)]
  path = file_and_argument.partition(":")[0]
  suites = call_file("suites", file_and_argument, "get_suites")
  if not isinstance(suites, dict) or not suites:
    raise ValueError(f"--suites={path}: get_suites() returns {str(suites)[:100]}, not suites")
  return [_read_suite(f"--suites={path}: suite {name!r}", name, suites[name], c) for name in suites]


def _read_suite(where: str, name: str, suite: dict, c: ConfigDict) -> Suite:
  if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == _OWN_NAME:
    raise ValueError(f"{where}: a name has letters, digits, _ and -, and is not {_OWN_NAME!r}")
  if not isinstance(suite, dict):
    raise ValueError(f"{where} is not a dict but {str(suite)[:100]!r}")
  for key in suite:
    if key not in (*_SECTIONS, *_EVAL):
      choices = [*_SECTIONS, *_EVAL]
      raise ValueError(f"{where}: {key!r} is unknown{did_you_mean(key, choices)}; choose {choices}")
  changed = ConfigDict(c.to_dict())
  try:
    if "env" in suite:
      changed.env = dict(suite["env"])
      changed.data.sources = ()
    for section in ("data", "rollout"):
      changed[section].update(suite.get(section, {}))
    settings = {key: suite[key] for key in _EVAL if key in suite}
    if "splits" in settings:
      settings["final_splits"] = tuple(settings.pop("splits"))
    changed.eval.update(settings)
    complete_parts(changed, [])
    validate(changed)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{where}: {error}") from error
  if not changed.eval.final_splits:
    raise ValueError(f"{where}: its splits are empty")
  return Suite(name, changed.lock())
