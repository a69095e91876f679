"""One visit to the shop: what a message of the policy does, and the page that it leads to.

The action of a message is the text in its last <action>..</action>, else its last line that is not
empty; a thought before it does not count. It is `search[words]` where there is a search bar, or
`click[value]` with a button, a product's number or an option's value of the page, in any case.
Anything else leaves the page as it is, and the turn is invalid.

"Back to Search" forgets everything; "< Prev" leads from a sub-page to the product, and from there
to the results, where the chosen options are forgotten. "Buy Now" ends the episode, and so do
`limit` turns.

Source: WebShop, arXiv:2207.01206, and its release.
"""

import re
from typing import Callable

from sdpo_jax import thought
from sdpo_jax.envs.agents import webshop_pages as pages
from sdpo_jax.envs.agents.webshop_goals import Goal
from sdpo_jax.envs.agents.webshop_products import Product
from sdpo_jax.records import Turn

INSTRUCTION = """\
You shop on a web site. Find a product that fits the instruction, choose its options, and buy it.
In each turn, write one action on the last line:
search[words] where the page has a search bar
click[value] for a button, the number of a product, or the value of an option on the page
You have {limit} turns.

{page}"""
_ACTION = re.compile(r"(search|click)\[(.+)\]", re.IGNORECASE)
_TAG = re.compile(r"<(/?)action>", re.IGNORECASE)


def action_of(message: str) -> tuple[str, str]:
  """Returns the verb of a message's action and its argument, in lower case; "" for none."""
  text, is_open = thought.split(message)
  if is_open:
    return "", ""
  match = _ACTION.fullmatch(_line_of(text).strip())
  return (match[1].lower(), match[2].strip().lower()) if match else ("", "")


def _line_of(text: str) -> str:
  """Returns the text in the last pair of tags, else the last line that is not empty."""
  end = None
  for tag in reversed(list(_TAG.finditer(text))):
    if tag[1]:
      end = tag.start()
    elif end is not None:
      return text[tag.end() : end]
  lines = [line for line in text.splitlines() if line.strip()]
  return lines[-1] if lines else ""


class Visit:
  """One visit to the shop, which is used once.

  The page is that of a search bar (no query), of results (no product), of a product, or of one of
  its sub-pages.
  """

  def __init__(self, goal: Goal, *, find: Callable, judge: Callable, limit: int):
    """Enters the shop.

    find(words): returns the products that a search finds, the best first.
    judge(goal, product, values): returns the score and the reward of a purchase with these option
      values.
    limit: turns.
    """
    self._goal, self._find, self._judge, self._limit = goal, find, judge, limit
    self._turns = 0
    self._forget()

  def _forget(self) -> None:
    """Goes to the search bar."""
    self._hits: list[Product] | None = None
    self._page = 1
    self._leave()

  def _leave(self) -> None:
    """Leaves the product's page; its options are forgotten."""
    self._product: Product | None = None
    self._sub_page = ""
    self._chosen: dict[str, str] = {}

  def prompt(self) -> list[dict[str, str]]:
    """Returns the messages before the first action."""
    text = INSTRUCTION.format(limit=self._limit, page=self.observation())
    return [{"role": "user", "content": text}]

  def step(self, message: str) -> Turn:
    """Carries out the action of a message. EngineFailed if a search has no answer."""
    self._turns += 1
    verb, value = action_of(message)
    can_search = verb == "search" and self._hits is None
    can_click = verb == "click" and value in self.clickable()
    if can_click and value == pages.BUY.lower():
      return self._buy()
    if can_click:
      self._click(value)
    if can_search:
      self._hits, self._page = self._find(value), 1
    is_valid = can_search or can_click
    if self._turns >= self._limit:
      end = f"The {self._turns} turns are over, and nothing is bought."
      return Turn(end, 0.0, True, is_valid)
    return Turn(self.observation(), 0.0, False, is_valid)

  def close(self) -> None:
    """Ends the visit; nothing is held."""

  def clickable(self) -> list[str]:
    """Returns what can be clicked on the page and does something, in lower case."""
    if self._hits is None:
      return []
    if self._product is None:
      previous = [pages.PREVIOUS] if self._page > 1 else []
      asins = [product.asin for product in pages.on_page(self._hits, self._page)]
      buttons = [pages.BACK, *previous, pages.NEXT, *asins]
    elif self._sub_page:
      buttons = [pages.BACK, pages.PREVIOUS]
    else:
      values = [value for choices in self._product.options.values() for value in choices]
      buttons = [pages.BACK, pages.PREVIOUS, *pages.SUB_PAGES, pages.BUY, *values]
    return [button.lower() for button in buttons]

  def observation(self) -> str:
    """Returns the page as text."""
    text = self._goal.text
    if self._hits is None:
      return pages.search_page(text)
    if self._product is None:
      return pages.results_page(text, self._page, self._hits)
    if self._sub_page:
      return pages.sub_page(text, self._product, self._sub_page)
    return pages.item_page(text, self._product)

  def _click(self, value: str) -> None:
    """Follows a button that the page has."""
    if value == pages.BACK.lower():
      self._forget()
    elif self._product is None:
      self._click_results(value)
    elif value == pages.PREVIOUS.lower() and self._sub_page:
      self._sub_page = ""
    elif value == pages.PREVIOUS.lower():
      self._leave()
    elif value.capitalize() in pages.SUB_PAGES:
      self._sub_page = value.capitalize()
    else:  # as in WebShop, of two options that share a value the last one takes it
      name = [name for name, values in self._product.options.items() if value in values][-1]
      self._chosen[name] = value

  def _click_results(self, value: str) -> None:
    assert self._hits is not None
    if value == pages.NEXT.lower():
      self._page += 1
    elif value == pages.PREVIOUS.lower():
      self._page -= 1
    else:
      self._product = next(hit for hit in self._hits if hit.asin.lower() == value)

  def _buy(self) -> Turn:
    assert self._product is not None
    values = list(self._chosen.values())
    points, reward = self._judge(self._goal, self._product, values)
    end = f"You have bought {self._product.asin}. The score is {points:.2f} of 1."
    return Turn(end, reward, True)
