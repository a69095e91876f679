"""Questions that are answered by searching a corpus, with Search-R1's protocol as a conversation.

  Question: What is the birthplace of the author of The Lantern of Orvi?

  > <search>The Lantern of Orvi author</search>
  <information>Doc 1(Title: "The Lantern of Orvi") The form of The Lantern of Orvi is novel. ...
  Doc 2(Title: "The Garden of Orvi") ...
  Doc 3(Title: ...) ...</information>
  > <search>Velora Tamin birthplace</search>
  ...
  > <answer>Morvane</answer>
  The answer is right.

`search_episode.py` says what counts as an action, and what is rewarded. Two environments:

  SearchQA      the world of `search_corpus.py`, and questions about it
  SearchQARows  questions of config.data.sources, over a corpus file or a retriever at an address

Both need bm25s, but for a retriever at an address: `pip install 'sdpo_jax[search]'`. Its process is
started by `open`, or by the first search.
"""

import json

from sdpo_jax.envs.agents import search_corpus
from sdpo_jax.envs.agents.search_answers import golden_answers
from sdpo_jax.envs.agents.search_episode import SearchEpisode
from sdpo_jax.envs.agents.search_retriever import Index, Server
from sdpo_jax.envs.agents.skills import Skills
from sdpo_jax.envs.imports import need
from sdpo_jax.envs.rows import field, groups, row_name
from sdpo_jax.errors import SettingError, local_path, unknown
from sdpo_jax.records import Task

LIMIT = 4  # turns
TOP_K = 3  # passages
K1, B = 0.9, 0.4  # BM25's constants in Search-R1's index
SIZES = (100, 10_000)  # passages, least and most: names are drawn from all pairs of their parts
GENERAL = "Search for the name of one thing at a time, read its passage, then answer in few words."
SKILLS = {
  "birth": "Search for each name together with birth: the passage tells place and year.",
  "author": "Search for the title, then for the author whom its passage names.",
  "setting": "Search for the title, then for the place in which it is set.",
  "compare": "Search for both names, one in each turn, then compare the two numbers.",
}
KEYWORDS = [
  ["compare", ["or"]],
  ["author", ["author"]],
  ["setting", ["set"]],
  ["birth", ["birth", "birthplace"]],
]


class SearchQA:
  """Makes questions about a world of its own, which can be searched."""

  def __init__(
    self,
    *,
    size: int = 2000,
    world_seed: int = 0,
    limit: int = LIMIT,
    top_k: int = TOP_K,
    skill: str = "matched",
  ):
    """Makes the world. SettingError where bm25s is missing.

    size: passages. limit: turns of an episode. top_k: passages that a search shows. skill: which a
    teacher reads, "matched" or "random" (`skills.py`).
    """
    need("search_qa", "search", ("bm25s",))
    _check_counts(limit=limit, top_k=top_k)
    if not SIZES[0] <= size <= SIZES[1]:
      raise SettingError(f"config.env.size={size} must be from {SIZES[0]} to {SIZES[1]}")
    self._seed, self._limit, self._top_k = world_seed, limit, top_k
    self._world = search_corpus.make_world(world_seed, size)
    self._name = f"search_qa/{world_seed}/{size}"
    self.skill_text = Skills(self.skills(), where="search_qa", skill=skill, seed=world_seed).text
    self._index = Index(self._world.passages, k1=K1, b=B, stem=False)

  def open(self) -> None:
    """Starts the process that searches."""
    self._index.open()

  def close(self) -> None:
    """Ends it."""
    self._index.close()

  def task(self, split: str, index: int) -> Task:
    """Returns a question. ValueError for a split that does not exist."""
    question = self._question(split, index)
    data = {"answers": [question.answer], "index": index}
    data |= {"kind": question.template.kind, "difficulty": len(question.queries)}
    task = Task(
      f"{self._name}/{split}/{index}",
      question.text,
      solution=f"<answer>{question.answer}</answer>",
      split=split,
      data=data,
    )
    data["skill"] = self.skill_text(task)
    return task

  def walkthrough(self, task: Task) -> list[str]:
    """Returns messages that answer the task."""
    question = self._question(task.split, task.data["index"])
    searches = [f"<search>{query}</search>" for query in question.queries]
    return [*searches, f"<answer>{question.answer}</answer>"]

  def start(self, task: Task) -> SearchEpisode:
    """Begins an episode of the task."""
    return SearchEpisode(task.prompt, task.data["answers"], self.find, self._limit)

  def find(self, query: str) -> list[str]:
    """Returns the passages that a search shows, best first."""
    return [self._world.passages[number] for number in self._index.find(query, self._top_k)]

  def skills(self) -> dict:
    """Returns advice that a teacher may read, as a skills file holds it."""
    return {"general": GENERAL, "skills": SKILLS, "keywords": KEYWORDS}

  def _question(self, split: str, index: int) -> search_corpus.Question:
    if split not in search_corpus.SPLITS:
      raise ValueError(unknown("the split", split, search_corpus.SPLITS))
    return search_corpus.make_question(self._world, self._seed, split, index)


class SearchQARows:
  """Asks the questions of a data set, over a corpus or a retriever of the user's.

  A row has `question`; `golden_answers`, or Search-R1's `reward_model.ground_truth.target`; and it
  may have `data_source` and `id`.
  """

  def __init__(
    self,
    *,
    corpus: str = "",
    url: str = "",
    stem: bool = False,
    limit: int = LIMIT,
    top_k: int = TOP_K,
  ):
    """Reads the corpus. SettingError for one that cannot be used, and where bm25s is missing.

    Args:
      corpus: a JSONL file of rows {"id", "contents"}: a title line, a line feed, a text.
      url: the address of a retriever instead, such as http://127.0.0.1:8000/retrieve.
      stem: compares Porter's stems of words instead of the words; over a corpus only.
      limit: turns of an episode.
      top_k: passages that a search shows.
    """
    if bool(corpus) == bool(url):
      raise SettingError("set either config.env.corpus, to a JSONL file, or config.env.url")
    if url and stem:
      raise SettingError("config.env.stem=True would not be read: config.env.url searches itself")
    _check_counts(limit=limit, top_k=top_k)
    self._limit, self._top_k = limit, top_k
    self._index: Index | None = None
    if url:
      self._server = Server(url)
      return
    need("search_qa_rows", "search", ("bm25s", "Stemmer") if stem else ("bm25s",))
    self._passages = read_corpus(local_path(corpus))
    self._index = Index(self._passages, k1=K1, b=B, stem=stem)

  def open(self) -> None:
    """Starts the process that searches, or asks the retriever once. RuntimeError if that fails."""
    if self._index is None:
      self._server.find("test", 1)
    else:
      self._index.open()

  def close(self) -> None:
    """Ends the process."""
    if self._index is not None:
      self._index.close()

  def task_from_row(self, row: dict, split: str) -> Task:
    """Reads a row. ValueError that names the field."""
    answers = golden_answers(row)
    return Task(
      f"search_qa/{split}/{row_name(row, 'id')}",
      field(row, "question").strip(),
      solution=f"<answer>{answers[0]}</answer>",
      split=split,
      data={"answers": answers} | groups(row, kind="data_source"),
    )

  def start(self, task: Task) -> SearchEpisode:
    """Begins an episode of the task."""
    return SearchEpisode(task.prompt, task.data["answers"], self.find, self._limit)

  def find(self, query: str) -> list[str]:
    """Returns the passages that a search shows, best first."""
    if self._index is None:
      return self._server.find(query, self._top_k)
    return [self._passages[number] for number in self._index.find(query, self._top_k)]


def read_corpus(path: str) -> list[str]:
  """Returns the passages of a corpus file. SettingError with file and line for a bad one."""
  passages = []
  try:
    with open(path, "rb") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          passages.append(_contents(line, f"config.env.corpus: {path}, line {number}"))
  except OSError as error:
    raise SettingError(f"config.env.corpus: {path}: {error.strerror}") from None
  if not passages:
    raise SettingError(f"config.env.corpus: {path} holds no passage")
  return passages


def _contents(line: bytes, place: str) -> str:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    raise SettingError(f"{place}: the row is not JSON") from None
  if not isinstance(row, dict):
    raise SettingError(f"{place}: the row is not an object")
  try:
    return field(row, "contents")
  except ValueError as error:
    raise SettingError(f"{place}: {error}") from None


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if value < 1:
      raise SettingError(f"config.env.{name}={value} must be at least 1")
