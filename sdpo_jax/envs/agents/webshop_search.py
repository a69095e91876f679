"""Finds products by words: BM25 with Lucene's defaults in WebShop (k1 0.9, b 0.4, Porter's stems).

What is searched of a product is its title, description, first bullet and options. The ranks are not
exactly Lucene's, whose tokenizer and whose coding of lengths differ.

The index is that of `search_retriever.py`, in the same kind of child process.
"""

from sdpo_jax.envs.agents.search_retriever import Index
from sdpo_jax.envs.agents.webshop_products import Product

MOST_HITS = 50
K1, B = 0.9, 0.4


class ProductSearch:
  """Finds the products of a shop; any number of threads may ask."""

  def __init__(self, products: list[Product]):
    self._products = products
    self._index = Index([searched_text(product) for product in products], k1=K1, b=B, stem=True)
    self.open, self.close = self._index.open, self._index.close

  def find(self, query: str) -> list[Product]:
    """Returns at most 50 products, the best first. EngineFailed if there is no answer."""
    return [self._products[number] for number in self._index.find(query, MOST_HITS)]


def searched_text(product: Product) -> str:
  """Returns the text of a product that is searched."""
  options = (f"{name}: {', '.join(values)}" for name, values in product.options.items())
  return " ".join([product.title, product.description, *product.bullets[:1], *options]).lower()
