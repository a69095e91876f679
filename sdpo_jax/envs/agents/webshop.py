"""Shopping in text: WebShop's pages, actions, goals and reward, over its product files.

  WebShop [SEP] Instruction: [SEP] find me quick dry shirt with color: blue, and price lower than
  30.00 dollars [SEP] Search
  > search[quick dry blue shirt]
  Instruction: [SEP] ... [SEP] Back to Search [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP]
  B081900012 [SEP] Kalona Shirt, quick dry, loose fit [SEP] $21.5 [SEP] ...
  > click[b081900012]
  > click[blue]
  > click[buy now]
  You have bought B081900012. The score is 1.00 of 1.

`webshop_visit.py` says what counts as an action and where it leads.

The reward of an episode is that of its purchase. With `won`, on which the released loop trains, it
is whether the score is 1; with `score` it is the score, which has many values. `webshop_reward.py`
says how that is reckoned, `webshop_pages.py` how pages look, `webshop_goals.py` what the splits
are.

Without files the shop is that of `webshop_catalog.py`. The files of the release that the published
numbers stand on are items_shuffle_1000.json and items_ins_v2_1000.json.

Needs bm25s, PyStemmer and thefuzz: `pip install 'sdpo_jax[webshop]'`. The package that is called
webshop in the registry is not used: it holds a web site, but no environment and no products.

Source: WebShop, arXiv:2207.01206, and its release.
"""

import logging

from sdpo_jax.envs.agents.skills import Skills
from sdpo_jax.envs.agents.webshop_catalog import make_files
from sdpo_jax.envs.agents.webshop_goals import SPLITS, Goal, make_goals, split_goals
from sdpo_jax.envs.agents.webshop_pages import BUY
from sdpo_jax.envs.agents.webshop_products import Product, make_catalog, read_catalog
from sdpo_jax.envs.agents.webshop_reward import find_nouns, same_option, score
from sdpo_jax.envs.agents.webshop_search import ProductSearch
from sdpo_jax.envs.agents.webshop_visit import Visit
from sdpo_jax.envs.imports import need
from sdpo_jax.errors import SettingError, local_path, unknown
from sdpo_jax.records import Task

LIMIT = 15  # turns
REWARDS = ("won", "score")
GENERAL = (
  "Search for the kind of product with the attributes wanted, open one whose price is low enough, "
  "click the value of every option wanted, then Buy Now."
)
SKILLS = {
  "options": "Click one value for each option that the instruction names, before Buy Now.",
  "price": "Compare the price with the limit before you open a product; if it is above, go back.",
}
KEYWORDS = [["options", ["color", "size", "scent", "style", "pack"]], ["price", ["price"]]]


class WebShop:
  """Keeps a shop, its goals and the process that searches it.

  Attributes that a run may log: `noun_model`, what finds the nouns of titles (`webshop_reward.py`);
  `skipped`, how many items of the product file were left out, by reason.
  """

  def __init__(
    self,
    *,
    products: str = "",
    attributes: str = "",
    human: str = "",
    on_bad_row: str = "error",
    reward: str = "won",
    world_seed: int = 0,
    limit: int = LIMIT,
    skill: str = "matched",
  ):
    """Reads the files. SettingError for one that cannot be used and for a missing package.

    Args:
      products: WebShop's product file; empty: a small shop of our own.
      attributes: its attribute file, with the instructions of synthetic goals.
      human: its file of people's instructions, of which the goals are then made.
      on_bad_row: "error", or "skip": leaves malformed items out and counts them.
      reward: "won" | "score".
      world_seed: of the shop of our own.
      limit: turns of an episode.
      skill: which a teacher reads, "matched" or "random" (`skills.py`).
    """
    need("webshop", "webshop", ("bm25s", "Stemmer", "thefuzz"))
    if reward not in REWARDS:
      raise SettingError(unknown("config.env.reward", reward, REWARDS))
    if on_bad_row not in ("error", "skip"):
      raise SettingError(unknown("config.env.on_bad_row", on_bad_row, ["error", "skip"]))
    if limit < 1:
      raise SettingError(f"config.env.limit={limit} must be at least 1")
    if bool(products) != bool(attributes) or (human and not products):
      raise SettingError(
        f"config.env.products={products!r}, attributes={attributes!r}, human={human!r}: set "
        "products and attributes, or none of the three for a shop of our own"
      )
    self._reward, self._limit = reward, limit
    if products:
      paths = (local_path(products), local_path(attributes), human and local_path(human))
      catalog = read_catalog(*paths, on_bad_row=on_bad_row)
    else:
      catalog = make_catalog(*make_files(world_seed), {}, place="the shop")
    self._goals = split_goals(make_goals(catalog.products, human=bool(human)))
    self._products = {product.asin: product for product in catalog.products}
    self._name = f"webshop/{'files' if products else world_seed}"
    self.skill_text = Skills(self.skills(), where="webshop", skill=skill, seed=world_seed).text
    self.skipped = catalog.skipped
    self.noun_model, self._nouns = find_nouns()
    self._search = ProductSearch(catalog.products)

  def open(self) -> None:
    """Starts the process that searches."""
    logging.info(
      "webshop: %d products, left out: %s; nouns by %s",
      len(self._products),
      self.skipped,
      self.noun_model,
    )
    self._search.open()

  def close(self) -> None:
    """Ends it."""
    self._search.close()

  def size(self, split: str) -> int:
    """Returns the number of goals in a split."""
    return len(self._split(split))

  def task(self, split: str, index: int) -> Task:
    """Returns a goal of the split as a task; behind the last one they begin again."""
    goals = self._split(split)
    goal = goals[index % len(goals)]
    data = {
      "goal": goal._asdict(),
      "kind": self._products[goal.asin].category,
      "difficulty": len(goal.options),
    }
    task = Task(f"{self._name}/{split}/{index}", goal.text, split=split, data=data)
    data["skill"] = self.skill_text(task)
    return task

  def start(self, task: Task) -> Visit:
    """Begins an episode of the task."""
    return Visit(_goal(task), find=self._search.find, judge=self._judge, limit=self._limit)

  def _judge(self, goal: Goal, bought: Product, values: list[str]) -> tuple[float, float]:
    """Returns the score and the reward of a purchase. values: of the chosen options."""
    points = score(goal, self._products[goal.asin], bought, values, self._nouns)
    return points, (float(points == 1.0) if self._reward == "won" else points)

  def walkthrough(self, task: Task) -> list[str]:
    """Returns actions that buy the product of the goal, where a search by its title finds it."""
    goal = _goal(task)
    product = self._products[goal.asin]
    actions = [f"search[{product.title}]", f"click[{goal.asin}]"]
    for name, values in product.options.items():
      exact = [value for value in values if f"{name} {value}" in goal.options]
      alike = [value for value in values if any(same_option(value, o) for o in goal.options)]
      actions += [f"click[{value}]" for value in (exact or alike)[:1]]
    return [*actions, f"click[{BUY}]"]

  def skills(self) -> dict:
    """Returns advice that a teacher may read, as a skills file holds it."""
    return {"general": GENERAL, "skills": SKILLS, "keywords": KEYWORDS}

  def _split(self, split: str) -> list[Goal]:
    if split not in SPLITS:
      raise ValueError(unknown("the split", split, SPLITS))
    return self._goals[split]


def _goal(task: Task) -> Goal:
  fields = task.data["goal"]
  sequences = {name: tuple(fields[name]) for name in ("attributes", "options")}
  return Goal(**(fields | sequences))
