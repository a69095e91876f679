"""Writes WebShop's pages as text: the parts that its pages show, joined by " [SEP] ".

  WebShop [SEP] Instruction: [SEP] T [SEP] Search
  Instruction: [SEP] T [SEP] Back to Search [SEP] Page 1 (Total results: N) [SEP] Next > [SEP]
    asin, title and price of each product, ten a page; from page 2 on "< Prev" before "Next >"
  Instruction: [SEP] T [SEP] Back to Search [SEP] < Prev [SEP] an option's name, its values, ...
    [SEP] title [SEP] Price: P [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews
    [SEP] Buy Now
  Instruction: [SEP] T [SEP] Back to Search [SEP] < Prev [SEP] a text, or one for each bullet

T is the goal's text. Chosen options are not marked, "Next >" is always there, and there are no
reviews, as without WebShop's file of reviews.

Source: WebShop's release, whose templates were rendered to see what its text mode shows.
"""

from sdpo_jax.envs.agents.webshop_products import Product

SEPARATOR = " [SEP] "
PAGE_SIZE = 10  # products
BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")
NO_REVIEWS = "No reviews found"


def search_page(text: str) -> str:
  """Returns the page with the search bar. text: the goal's."""
  return SEPARATOR.join(["WebShop", "Instruction:", text, "Search"])


def results_page(text: str, page: int, hits: list[Product]) -> str:
  """Returns a page of search results; pages are counted from 1. hits: those of all pages."""
  parts = [f"Page {page} (Total results: {len(hits)})"]
  if page > 1:
    parts.append(PREVIOUS)
  parts.append(NEXT)
  for product in on_page(hits, page):
    parts += [product.asin, product.title, product.price_tag]
  return _page(text, parts)


def on_page(hits: list[Product], page: int) -> list[Product]:
  """Returns the search results of one page; none behind the last."""
  return hits[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]


def item_page(text: str, product: Product) -> str:
  """Returns the page of a product."""
  parts = [PREVIOUS]
  for name, values in product.options.items():
    parts += [name, *values]
  parts += [product.title, f"Price: {product.price_tag}", "Rating: N.A.", *SUB_PAGES, BUY]
  return _page(text, parts)


def sub_page(text: str, product: Product, name: str) -> str:
  """Returns the page of a product's description, features or reviews."""
  texts = {
    "Description": (product.description,),
    "Features": product.bullets,
    "Reviews": (NO_REVIEWS,),
  }
  return _page(text, [PREVIOUS, *filter(None, map(str.strip, texts[name]))])


def _page(text: str, parts: list[str]) -> str:
  return SEPARATOR.join(["Instruction:", text, BACK, *parts])
