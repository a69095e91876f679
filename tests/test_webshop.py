"""Tests the shop: reading of files, goals, pages word for word, actions, reward, whole episodes."""

import concurrent.futures
import importlib.util
import json
import random
import sys
import types

import pytest

from sdpo_jax.envs.agents import (
  webshop,
  webshop_catalog,
  webshop_goals,
  webshop_reward,
)
from sdpo_jax.envs.agents import webshop_pages as pages
from sdpo_jax.envs.agents.webshop import WebShop
from sdpo_jax.envs.agents.webshop_goals import Goal
from sdpo_jax.envs.agents.webshop_products import make_catalog
from sdpo_jax.envs.agents.webshop_search import searched_text
from sdpo_jax.envs.agents.webshop_visit import action_of
from sdpo_jax.errors import SettingError

# Not `importorskip`, which would import bm25s, and with it jax's default device, here.
has_extra = all(importlib.util.find_spec(name) for name in ("bm25s", "Stemmer", "thefuzz"))
needs_extra = pytest.mark.skipif(not has_extra, reason="needs the extra webshop")

ITEM = {
  "asin": "B01",
  "name": "Red Tea Pot, 2 Pack",
  "full_description": "A pot. ",
  "small_description": ["Holds tea.", "Has a lid."],
  "pricing": "$8.00",
  "customization_options": {
    "Color": [{"value": " Red/Blue "}, {"value": "Green"}],
    "Size": None,
    "Fit": [{"value": "XL"}],
  },
  "category": "home",
  "query": " Tea Pot ",
  "product_category": "Home › Kitchen › Pots",
}
KNOWN = {
  "attributes": ["heat proof"],
  "instruction": "find me heat proof pot",
  "instruction_attributes": ["heat proof"],
}


def product(attributes=KNOWN, human=(), **changes):
  item = ITEM | changes
  files = {item["asin"]: attributes}, {item["asin"]: list(human)}
  return make_catalog([item], *files, place="p.json").products[0]


def test_an_item_becomes_a_product():
  pot = product()
  assert (pot.title, pot.price, pot.price_tag, pot.query) == (
    "Red Tea Pot, 2 Pack",
    8.0,
    "$8.0",
    "tea pot",
  )
  assert pot.options == {"color": ("red | blue", "green"), "fit": ("xl",)}
  assert pot.categories == {"Home", "Kitchen", "Pots"}
  assert product(small_description="One.").bullets == ("One.",)
  assert searched_text(pot) == (
    "red tea pot, 2 pack a pot.  holds tea. color: red | blue, green fit: xl"
  )


@pytest.mark.parametrize(
  "pricing, tag, least, most",
  [
    ("$10.99", "$10.99", 10.99, 10.99),
    ("$8.00 to $12.00", "$8.0 to $12.0", 8.0, 12.0),
    ("$1,250.50", "$1250.5", 1250.5, 1250.5),
    ("", "$100.0", 100.0, 100.0),
    (None, "$100.0", 100.0, 100.0),
  ],
)
def test_prices(pricing, tag, least, most):
  pot = product(pricing=pricing)
  assert pot.price_tag == tag and least <= pot.price <= most
  assert pot.price == product(pricing=pricing).price  # drawn alike


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"name": None}, "field 'name' is missing"),
    ({"pricing": "free"}, "field 'pricing' is 'free'"),
    ({"pricing": "$1.2.3"}, "field 'pricing'"),
    ({"small_description": [1]}, "field 'small_description'"),
    ({"customization_options": []}, None),
    ({"customization_options": [1]}, "field 'customization_options'"),
    ({"customization_options": {"a": [{"image": 1}]}}, "field 'value'"),
    ({"product_category": 3}, "field 'product_category'"),
    ({"query": " "}, "field 'query' is empty"),
  ],
)
def test_a_malformed_item_names_file_index_and_field(changes, words):
  items = [ITEM, ITEM | {"asin": "B02"} | changes, 3]
  if words is None:
    assert make_catalog(items[:2], {}, {}, place="p.json").products[1].options == {}
    return
  with pytest.raises(SettingError, match=f"p.json, item 1: {words}"):
    make_catalog(items, {}, {}, place="p.json")
  catalog = make_catalog(items, {}, {}, place="p.json", on_bad_row="skip")
  assert [p.asin for p in catalog.products] == ["B01"]
  assert catalog.skipped == {"asin": 0, "malformed": 2}


def test_items_without_a_number_of_their_own_are_counted():
  items = [ITEM, ITEM, ITEM | {"asin": "nan"}, ITEM | {"asin": "B" * 11}, ITEM | {"asin": "B2"}]
  catalog = make_catalog(items, {}, {}, place="p.json")
  assert [p.asin for p in catalog.products] == ["B01", "B2"] and catalog.skipped["asin"] == 3
  with pytest.raises(SettingError, match="item 0: field 'instruction_attributes' is empty"):
    make_catalog([ITEM], {"B01": {"instruction": "find"}}, {}, place="p.json")


def test_other_files_are_malformed_too():
  for files, words in [
    (({"B01": 3}, {}), "the attribute file holds no object for B01"),
    (({"B01": {"attributes": [1]}}, {}), "field 'attributes'"),
    (({}, {"B01": 3}), "people's instructions holds no list for B01"),
    (({}, {"B01": [3]}), "an instruction is not an object"),
    (({}, {"B01": [{}]}), "field 'instruction' is missing"),
  ]:
    with pytest.raises(SettingError, match=f"p.json, item 0: .*{words}"):
      make_catalog([ITEM], *files, place="p.json")


def test_synthetic_goals_are_all_combinations():
  goals = webshop_goals.make_goals([product(), product(attributes={})], human=False)
  assert [goal.options for goal in goals] == [
    ("color red | blue", "fit xl"),
    ("color green", "fit xl"),
  ]
  assert {goal.limit for goal in goals} < {20.0, 30.0, 40.0} and len(goals) == 2
  assert goals[1].text == (
    "find me heat proof pot with color: green, and fit: xl, "
    f"and price lower than {goals[1].limit:.2f} dollars"
  )
  (bare,) = webshop_goals.make_goals([product(customization_options=None)], human=False)
  assert bare.text.startswith("find me heat proof pot, and price") and bare.options == ()


@pytest.mark.parametrize("price, steps", [(10.0, (20, 50)), (975.0, (990, 990)), (985.0, None)])
def test_the_limit_is_the_larger_of_two_of_the_next_four_steps(price, steps):
  limits = set()
  for number in range(60):
    pot = product(asin=f"B{number}", pricing=f"${price}", customization_options=None)
    (goal,) = webshop_goals.make_goals([pot], human=False)
    limits.add(goal.limit)
    assert ("price lower" in goal.text) == (steps is not None)
  if steps is None:
    assert limits == {webshop_goals.NO_LIMIT}
  elif price == 10.0:
    assert limits == {30.0, 40.0, 50.0}
  else:
    assert limits == {990.0}


def test_human_goals_keep_what_people_wrote():
  wish = {
    "instruction": "I want a pot.",
    "instruction_attributes": ["heat proof"],
    "instruction_options": ["green"],
  }
  pot = product(human=[wish, wish | {"instruction_attributes": []}])
  (goal,) = webshop_goals.make_goals([pot], human=True)
  assert goal.text.startswith("I want a pot, and price lower than ") and goal.options == ("green",)


def test_goals_are_shuffled_as_in_the_release_and_split():
  goals = [Goal(str(i), "", (), (), 0.0) for i in range(1600)]
  expected = list(goals)
  random.seed(233)
  random.shuffle(expected)
  splits = webshop_goals.split_goals(goals)
  assert splits == {"test": expected[:500], "eval": expected[500:1500], "train": expected[1500:]}
  with pytest.raises(SettingError, match="has 1500 goals"):
    webshop_goals.split_goals(goals[:1500])


def test_pages_are_webshops_word_for_word():
  pot = product()
  assert pages.search_page("T") == "WebShop [SEP] Instruction: [SEP] T [SEP] Search"
  head = "Instruction: [SEP] T [SEP] Back to Search [SEP] "
  assert pages.results_page("T", 1, [pot]) == (
    head + "Page 1 (Total results: 1) [SEP] Next > [SEP] B01 [SEP] Red Tea Pot, 2 Pack [SEP] $8.0"
  )
  assert pages.results_page("T", 2, [pot] * 11) == (
    head + "Page 2 (Total results: 11) [SEP] < Prev [SEP] Next > [SEP] B01 [SEP] "
    "Red Tea Pot, 2 Pack [SEP] $8.0"
  )
  assert pages.results_page("T", 3, [pot] * 11) == (
    head + "Page 3 (Total results: 11) [SEP] < Prev [SEP] Next >"
  )
  assert pages.item_page("T", pot) == (
    head + "< Prev [SEP] color [SEP] red | blue [SEP] green [SEP] fit [SEP] xl [SEP] "
    "Red Tea Pot, 2 Pack [SEP] Price: $8.0 [SEP] Rating: N.A. [SEP] Description [SEP] Features "
    "[SEP] Reviews [SEP] Buy Now"
  )
  assert pages.sub_page("T", pot, "Description") == head + "< Prev [SEP] A pot."
  assert pages.sub_page("T", pot, "Features") == (head + "< Prev [SEP] Holds tea. [SEP] Has a lid.")
  assert pages.sub_page("T", pot, "Reviews") == head + "< Prev [SEP] No reviews found"


@pytest.mark.parametrize(
  "message, action",
  [
    ("search[Red Pot]", ("search", "red pot")),
    ("I think.\n  Click[< Prev]  \n", ("click", "< prev")),
    ("<action>click[B01]</action> bye", ("click", "b01")),
    ("<action>search[a]</action><action>search[b]</action>", ("search", "b")),
    ("<action>search[a]</action>\n<action>", ("search", "a")),
    ("<think>search[a]</think>\nclick[b]", ("click", "b")),
    ("<think>\nclick[b]", ("", "")),
    ("click[a] click[b]", ("click", "a] click[b")),
    ("click[b] now", ("", "")),
    ("search[]", ("", "")),
    ("buy[x]", ("", "")),
    ("search[a\nb]", ("", "")),
    ("", ("", "")),
    ("search[\x00]", ("search", "\x00")),
  ],
)
def test_actions(message, action):
  assert action_of(message) == action


@needs_extra
@pytest.mark.parametrize(
  "own, texts, matched",
  [
    (["tea tree", "essential oil", "natural ingredients"], {}, 3),
    (["essential oil", "natural ingredients"], {}, 2),
    ([], {"small_description": ["It has Essential Oils and smells"]}, 1),
    ([], {"full_description": "of natural ingredients", "name": "Tea Tree"}, 2),
    (["tea bag", "earl gray", "lipton"], {"name": "English tea"}, 0),
  ],
)
def test_attributes_are_matched_as_in_the_released_tests(own, texts, matched):
  bought = product(attributes={"attributes": own}, **texts)
  wanted = ["tea tree", "essential oils", "natural ingredients"]
  assert sum(webshop_reward.has_attribute(bought, text) for text in wanted) == matched


@needs_extra
@pytest.mark.parametrize(
  "wanted, bought, matched",
  [
    (["grey", "xl", "pack of 12"], ["pack of 12", "grey", "xl"], 3),  # in any order
    (["grey", "xl", "pack of 12"], ["pack of 12", "blue", "xl"], 2),
    (["cool powder snow", "xl"], ["xl", "powder snow"], 2),
    (["color light teal"], ["light sky"], 1),  # both are "light", which comes before "teal"
    (["color light blue"], ["light green"], 0),  # "blue" and "green" come before "light"
    (["color sky blue"], ["navy blue"], 1),  # both are "blue", which comes before "navy"
    (["size large"], ["small"], 0),
    ([], ["large"], 0),  # none wanted
    (["large"], [], 0),
  ],
)
def test_options_are_matched_by_ratio_and_colour(wanted, bought, matched):
  same = webshop_reward.same_option
  assert sum(any(same(value, option) for value in bought) for option in wanted) == matched


@pytest.mark.parametrize(
  "title, changes, points",
  [
    ("ant bee cat dog", {}, 1.0),  # s = 1
    ("ant xx", {}, 1.0),  # s = 0.25 > 0.2
    ("ant", {"wanted": "ant bee cat dog elk"}, 0.5),  # s = 0.2, and nothing else alike
    ("ant", {"wanted": "ant bee cat dog elk", "query": "tea pot"}, 1.0),
    ("ant", {"wanted": "ant bee cat dog elk", "product_category": "b › Pots › Home"}, 1.0),
    ("ant", {"wanted": "ant bee cat dog elk", "product_category": "Home › Home › b"}, 0.5),
    ("ant", {"wanted": "ant bee cat dog elk fox gnu hen ibis jay kit", "query": "tea pot"}, 0.1),
    ("owl", {"query": "tea pot", "product_category": ITEM["product_category"]}, 0.0),
    ("ant", {"wanted": "of it 12"}, 0.5),  # no noun is wanted: s = 0.2
    ("ant", {"wanted": "of it 12", "query": "tea pot"}, 1.0),
  ],
)
def test_the_type_of_a_product_in_steps(title, changes, points):
  wanted = product(name=changes.pop("wanted", "ant bee cat dog"))
  bought = product(name=title, **({"query": "x", "product_category": "y"} | changes))
  assert webshop_reward.type_score(wanted, bought, webshop_reward.words) == points


@needs_extra
def test_scores_of_the_released_tests():
  texts = {"full_description": "", "small_description": []}
  title = "Mens D.O.N. Issue 2 Gca Basketball Sneakers Shoes Casual - Off White"
  own = {"attributes": ["tea tree", "essential oil", "natural ingredients"]}
  wanted = ("tea tree", "essential oils", "natural ingredients")
  goal = Goal("B01", "", wanted, ("color grey", "size xl"), 40.0)
  bought = product(attributes=own, name=title, pricing="$35", **texts)

  def score(goal, bought, wanted=bought):
    values = ["grey", "xl"]
    return webshop_reward.score(goal, wanted, bought, values, webshop_reward.words)

  assert score(goal, bought) == 1.0
  assert score(goal, bought._replace(price=40.0)) == 1.0
  assert score(goal, bought._replace(price=40.01)) == pytest.approx(5 / 6)
  spoken = bought._replace(
    attributes=(), bullets=("It has essential oils",), description="made of natural ingredients"
  )
  assert score(goal, spoken) == pytest.approx(5 / 6)
  more = goal._replace(options=(*goal.options, "amount pack of 12"))
  assert score(more, bought) == pytest.approx(6 / 7)
  cord = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"
  other = "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic DVD/VCR Home Theater"
  bought = bought._replace(title=other, query="x", categories=frozenset("ade"))
  assert score(more, bought, product(name=cord)) == pytest.approx(0.5 * 6 / 7)


@needs_extra
def test_the_ratio_is_thefuzzs():
  assert webshop_reward.ratio("essential oil", "essential oils") == 96
  assert webshop_reward.ratio("café", "caf") == 100  # letters outside of ASCII are dropped


def test_a_title_has_words_where_spacy_has_no_model(monkeypatch):
  assert webshop_reward.words("The 2-Pack of Tea Pots for Ed") == ["pack", "tea", "pots"]
  monkeypatch.setattr(webshop_reward.importlib.util, "find_spec", lambda name: None)
  assert webshop_reward.find_nouns() == ("words", webshop_reward.words)


def test_spacys_nouns_are_used_where_its_model_is_installed(monkeypatch):
  class Token(types.SimpleNamespace):
    @property
    def pos_(self):
      return {"Tea": "PROPN", "pot": "NOUN"}.get(self.text, "ADJ")

  spacy = types.ModuleType("spacy")
  spacy.load = lambda name: lambda title: [Token(text=word) for word in title.split()]
  monkeypatch.setitem(sys.modules, "spacy", spacy)
  monkeypatch.setattr(webshop_reward.importlib.util, "find_spec", lambda name: True)
  name, nouns = webshop_reward.find_nouns()
  assert (name, nouns("red Tea pot")) == ("en_core_web_sm", ["tea", "pot"])


def test_the_shop_of_our_own_has_the_files_format():
  items, attributes = webshop_catalog.make_files(0)
  assert (items, attributes) == webshop_catalog.make_files(0) != webshop_catalog.make_files(1)
  catalog = make_catalog(items, attributes, {}, place="the shop")
  assert len(catalog.products) == webshop_catalog.SIZE and not any(catalog.skipped.values())


@pytest.fixture(scope="module")
def env():
  if not has_extra:
    pytest.skip("needs the extra webshop")
  env = WebShop(reward="score")
  env.open()
  yield env
  env.close()


def play(visit, *actions):
  return [visit.step(action) for action in actions][-1]


def test_a_scripted_player_buys_what_is_wanted(env):
  tasks = [env.task(split, index) for split in ("train", "eval", "test") for index in range(20)]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    for turns in threads.map(
      lambda task: [*map(env.start(task).step, env.walkthrough(task))], tasks
    ):
      assert turns[-1].reward == 1.0 and turns[-1].done and all(turn.valid for turn in turns)
      assert not any(turn.done for turn in turns[:-1])
  assert env.task("test", 0).data == env.task("test", env.size("test")).data


def test_a_random_player_seldom_does(env):
  rng, won, points = random.Random(0), 0, 0.0
  for index in range(100):
    task = env.task("train", index)
    visit, done = env.start(task), False
    while not done:
      choices = [f"click[{value}]" for value in visit.clickable()]
      turn = visit.step(rng.choice(choices or ["search[" + rng.choice(["rug", "shirt"]) + "]"]))
      assert turn.valid
      done = turn.done
    won, points = won + (turn.reward == 1.0), points + turn.reward
  assert won <= 5 and points < 40


def test_buttons_lead_where_they_do_in_webshop(env):
  task = env.task("train", 0)
  visit = env.start(task)
  (message,) = visit.prompt()
  start = visit.observation()
  assert message["content"].endswith(start) and start.endswith("[SEP] Search")
  results = play(visit, "search[rug]").observation
  assert "Page 1 (Total results: 16)" in results
  second = play(visit, "click[Next >]").observation
  assert "Page 2" in second and play(visit, "click[< Prev]").observation == results
  asin = play(visit, "click[next >]").observation.split(pages.SEPARATOR)[6]
  item = play(visit, f"click[{asin.lower()}]").observation
  assert "[SEP] color [SEP]" in item and item.endswith("Reviews [SEP] Buy Now")
  value = item.split(pages.SEPARATOR)[5]
  assert play(visit, f"click[{value}]").observation == item and visit._chosen
  assert play(visit, "click[reviews]").observation.endswith(pages.NO_REVIEWS)
  assert play(visit, "click[< prev]").observation == item and visit._chosen == {"color": value}
  assert play(visit, "click[< prev]").observation == second and not visit._chosen
  assert play(visit, f"click[{asin}]", "click[back to search]").observation == start
  assert (
    env.start(task)
    .step("search[unicorn]")
    .observation.endswith("Page 1 (Total results: 0) [SEP] Next >")
  )


@pytest.mark.parametrize(
  "message",
  ["", "\x00", "hm", "click[search]", "click[buy now]", "search[]", "click[\ud800]", "x" * 10**5]
  + ["<action>" * 10**4, "click[" * 10**4, "search[a]\nclick[b]"],
  ids=lambda message: repr(message[:20]),
)
def test_anything_else_leaves_the_page_as_it_is(env, message):
  visit = env.start(env.task("train", 0))
  before = visit.observation()
  assert visit.step(message) == (before, 0.0, False, False)
  visit.step("search[rug]")
  results = visit.observation()
  assert visit.step("search[shirt]") == (results, 0.0, False, False)  # there is no bar


@pytest.mark.parametrize("words", ["\ud800", "\x00", "x" * 10**5, "🐟", "]["])
def test_any_words_can_be_searched(env, words):
  turn = env.start(env.task("train", 0)).step(f"search[{words}]")
  assert turn.valid and "(Total results: 0)" in turn.observation


def test_the_last_turn_says_that_it_is_over(env):
  visit = env.start(env.task("train", 0))
  turns = [visit.step("hm") for _ in range(webshop.LIMIT)]
  assert [turn.done for turn in turns] == [False] * 14 + [True]
  assert turns[-1].observation == "The 15 turns are over, and nothing is bought."
  task = env.task("train", 0)
  *actions, buy = env.walkthrough(task)
  visit = env.start(task)
  play(visit, *["hm"] * (webshop.LIMIT - len(actions) - 1), *actions)
  assert visit.step(buy).reward == 1.0  # in the last turn


def test_the_reward_is_whether_the_score_is_one_or_the_score(env, monkeypatch):
  task = env.task("train", 0)
  actions = [action for action in env.walkthrough(task) if "purple" not in action]
  partial = play(env.start(task), *actions)
  assert partial.reward == pytest.approx(4 / 5)
  assert partial.observation.endswith("The score is 0.80 of 1.")
  monkeypatch.setattr(env, "_reward", "won")
  assert play(env.start(task), *actions).reward == 0.0
  assert play(env.start(task), *env.walkthrough(task)).reward == 1.0


@needs_extra
def test_a_shop_of_the_users_files(tmp_path):
  items, attributes = webshop_catalog.make_files(5)
  wish = {"instruction": "a rug", "instruction_attributes": ["non slip"]}
  human = {item["asin"]: [wish | {"instruction_options": ["blue"]}] * 9 for item in items}
  paths = {}
  for name, content in {"products": items, "attributes": attributes, "human": human}.items():
    paths[name] = str(tmp_path / f"{name}.json")
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  own = WebShop(world_seed=5)
  read = WebShop(products=paths["products"], attributes=paths["attributes"])
  people = WebShop(**paths)
  assert own.task("eval", 7).data == read.task("eval", 7).data
  assert people.size("train") == 300 and people.task("test", 0).prompt.startswith(
    "a rug, and price"
  )
  for shop in (own, read, people):
    shop.close()
  (tmp_path / "products.json").write_text("{}")
  with pytest.raises(SettingError, match="config.env.products: .* holds no JSON list"):
    WebShop(products=paths["products"], attributes=paths["attributes"])


@needs_extra
@pytest.mark.parametrize(
  "settings, words",
  [
    ({"products": "webshop", "attributes": "a"}, "the package webshop of the registry has none"),
    ({"products": "a"}, "set products and attributes"),
    ({"human": "a"}, "set products and attributes"),
    ({"reward": "wun"}, "did you mean 'won'"),
    ({"on_bad_row": "x"}, "config.env.on_bad_row"),
    ({"limit": 0}, "config.env.limit=0"),
  ],
)
def test_wrong_settings_are_refused(settings, words):
  with pytest.raises(SettingError, match=words):
    WebShop(**settings)


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SettingError, match=r"pip install 'sdpo_jax\[webshop\]'"):
    WebShop()
