"""Finds texts for a query: by an index in a process of its own, or by asking a server.

`Index` holds its texts in a child process, one for all episodes (`search_worker.py`, over bm25s).
`Server` asks a retriever that speaks Search-R1's protocol: a POST of

  {"queries": [query], "topk": k, "return_scores": true}

is answered by {"result": [[{"document": {"contents": text}, "score": number}, ...]]}.

Queries come from the policy. Half a surrogate pair becomes "?", and what stands beyond the first
MAX_QUERY characters is left away, so that no query is slow.
"""

import json
import pathlib
import re
import tempfile
import urllib.error
import urllib.request

from sdpo_jax.envs.agents import search_worker
from sdpo_jax.envs.agents.processes import Pool
from sdpo_jax.errors import SettingError

MAX_QUERY = 1000  # characters
TIME_S = 20.0  # for an answer; below what a judge may take
START_S = 300.0  # for an index: 100,000 passages take ten seconds on a free core


def clean(query: str) -> str:
  """Returns a query that any retriever can read."""
  return query[:MAX_QUERY].encode("utf-8", "replace").decode().replace("\x00", " ")


class Index:
  """Searches texts by BM25 in one child process; any number of threads may ask.

  k1, b: BM25's saturation and its correction for length.
  stem: reduces words to their stems.
  """

  def __init__(self, texts: list[str], *, k1: float, b: float, stem: bool):
    self._folder = tempfile.TemporaryDirectory(prefix="search_")
    corpus = pathlib.Path(self._folder.name) / "corpus.jsonl"
    with open(corpus, "w", encoding="ascii") as lines:
      lines.writelines(json.dumps(text) + "\n" for text in texts)
    settings = {"corpus": str(corpus), "k1": k1, "b": b, "stem": stem}
    self._pool = Pool(
      "the search index", search_worker.__file__, settings, size=1, time_s=TIME_S, start_s=START_S
    )

  def open(self) -> None:
    """Starts the process and waits for it. EngineFailed if it does not start."""
    self._pool.open()

  def find(self, query: str, k: int) -> list[int]:
    """Returns the numbers of at most k texts, best first. EngineFailed if there is no answer."""
    return self._pool.ask([clean(query), k])

  def close(self) -> None:
    """Ends the process."""
    self._pool.close()
    self._folder.cleanup()


class Server:
  """Asks a retriever behind an address, such as http://127.0.0.1:8000/retrieve."""

  def __init__(self, url: str):
    if not re.match(r"https?://", url):
      raise SettingError(f"config.env.url={url!r} must begin with http:// or https://")
    self._url = url

  def find(self, query: str, k: int) -> list[str]:
    """Returns at most k texts, best first. RuntimeError for an answer that is none."""
    body = {"queries": [clean(query)], "topk": k, "return_scores": True}
    request = urllib.request.Request(
      self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
      with urllib.request.urlopen(request, timeout=TIME_S) as response:
        reply = json.loads(response.read())
      texts = [hit["document"]["contents"] for hit in reply["result"][0]]
    except (urllib.error.URLError, OSError) as error:
      raise RuntimeError(f"the retriever at {self._url} does not answer: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError):
      raise RuntimeError(f"the retriever at {self._url} sent no list of documents") from None
    if not all(isinstance(text, str) for text in texts):
      raise RuntimeError(f"the retriever at {self._url} sent a document that is no text")
    return texts[:k]
