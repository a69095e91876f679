"""What is known about a world, which a teacher may read and the policy does not: a skills file.

A file is JSON:

  {"general": text,                     for every task
   "skills": {name: text, ...},         each for some tasks
   "keywords": [[name, [word, ...]], ...],
   "match": "first"}                    or "all"; may be left out

A skill fits a task if one of its words stands in the task's description as a whole word, in any
case; a word may be a phrase. Of those that fit, `match` takes the first in the order of `keywords`,
or all. The skill of a task is the general text and what was taken.

With `skill="random"` a task gets as many skills as fit it, but others, by a hash of (seed, task):
that tells what a text of its kind does from what the right one does.
"""

import json
import pathlib
import random
import re

from sdpo_jax.errors import unknown
from sdpo_jax.records import Task

CHOICES = ("matched", "random")
OWN = pathlib.Path(__file__).parents[2] / "assets" / "skills"  # files that come with the package


class Skills:
  """Chooses the skill of a task.

  content: what a skills file holds.
  where: what its errors name.
  skill: "matched" or "random".
  seed: of the random choice.
  """

  def __init__(self, content, *, where: str, skill: str = "matched", seed: int = 0):
    if skill not in CHOICES:
      raise ValueError(unknown("config.env.skill", skill, CHOICES))
    fault = _fault(content)
    if fault:
      raise ValueError(f"{where} is no file of skills: {fault}")
    self._general, self._skills = content["general"], content["skills"]
    self._takes_all = content.get("match", "first") == "all"
    self._keywords = [(name, _pattern(words)) for name, words in content["keywords"]]
    self._skill, self._seed = skill, seed
    if skill == "random" and len(self._skills) < 2:
      raise ValueError(f"config.env.skill='random' needs two skills; {where} has fewer")

  def matching(self, description: str) -> list[str]:
    """Returns the names of the skills that fit a description, without repetition."""
    fitting = [name for name, words in self._keywords if words.search(description)]
    fitting = list(dict.fromkeys(fitting))
    return fitting if self._takes_all else fitting[:1]

  def text(self, task: Task) -> str:
    """Returns the skill of a task."""
    names = self.matching(task.prompt)
    if self._skill == "random":
      others = sorted(self._skills.keys() - set(names))
      rng = random.Random(f"skill/{self._seed}/{task.id}")
      names = rng.sample(others, min(len(names), len(others)))
    return "\n".join([self._general, *(self._skills[name] for name in names)])


def read_skills(file: str | pathlib.Path):
  """Reads a skills file, which is not checked yet. ValueError with its name if it is no JSON."""
  try:
    return json.loads(pathlib.Path(file).expanduser().read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(f"config.env.skills={str(file)!r}: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"config.env.skills={str(file)!r} is no JSON: {error}") from error


def _fault(content) -> str:
  """Says what is wrong with the content of a skills file; "" if nothing is."""
  if not isinstance(content, dict):
    return "it holds no object"
  if content.keys() - {"general", "skills", "keywords", "match"}:
    return f"it has {sorted(map(str, content))}; general, skills, keywords and match are read"
  if not isinstance(content.get("general"), str) or not content["general"].strip():
    return "'general' is missing: the text for every task"
  skills, keywords = content.get("skills"), content.get("keywords")
  if not isinstance(skills, dict) or not all(isinstance(text, str) for text in skills.values()):
    return "'skills' must be {name: text}"
  if content.get("match", "first") not in ("first", "all"):
    return f"'match' is {content['match']!r}; it must be 'first' or 'all'"
  if not isinstance(keywords, list) or not all(map(_is_keyword, keywords)):
    return "'keywords' must be [[name, [word, ...]], ...]"
  strangers = [name for name, _ in keywords if name not in skills]
  return f"'keywords' names {strangers[0]!r}, which is no skill" if strangers else ""


def _is_keyword(entry) -> bool:
  return (
    isinstance(entry, list)
    and len(entry) == 2
    and isinstance(entry[0], str)
    and isinstance(entry[1], list)
    and bool(entry[1])
    and all(isinstance(word, str) and word.strip() for word in entry[1])
  )


def _pattern(words: list[str]) -> re.Pattern:
  """Returns what finds any of the words as a whole word."""
  choices = "|".join(re.escape(word.strip()) for word in words)
  return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)
