"""Searches texts by BM25, as an engine in its own process (`engine_child.py` runs it).

A request is [query, k]. The answer holds the numbers of at most k texts, the best first: only texts
that share a word with the query, and of equal scores the lower number first. So it is the same on
every machine, and a query of unknown words finds nothing.

The formula is Lucene's, as bm25s computes it; words are two letters or longer and no English stop
words. Where `stem` is set they are reduced to Porter's stems.

bm25s imports jax where it is installed, and computes on its default device while it is imported.
This process belongs to no accelerator, so jax is hidden first.

It is run by its path, so it imports nothing of this package.
"""

import json
import sys


def start(corpus: str, k1: float, b: float, stem: bool):
  """Indexes the texts of a file, a line of JSON each, and returns the function that searches."""
  sys.modules["jax"] = None  # type: ignore[assignment]
  import bm25s
  import numpy as np

  stemmer = None
  if stem:
    import Stemmer

    stemmer = Stemmer.Stemmer("porter")

  def words_of(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stemmer=stemmer, return_ids=False, show_progress=False)

  with open(corpus, encoding="utf-8") as lines:
    texts = [json.loads(line) for line in lines]
  index = bm25s.BM25(method="lucene", k1=k1, b=b)
  index.index(words_of(texts), show_progress=False)

  def find(request) -> list[int]:
    query, k = request
    known = [word for word in words_of([query])[0] if word in index.vocab_dict]
    if not known:
      return []
    scores = index.get_scores(known)
    hits = np.flatnonzero(scores > 0)
    order = np.argsort(-scores[hits], kind="stable")
    return hits[order[:k]].tolist()

  return find
