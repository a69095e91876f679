"""Tests skills files: which skill a task has, a random other one, and files that are refused."""

import json
import re

import pytest

from sdpo_jax.envs.agents.household import GENERAL, Household, meanings
from sdpo_jax.envs.agents.skills import OWN, Skills, read_skills
from sdpo_jax.records import Task

CONTENT = {
  "general": "Look first.",
  "skills": {"clothes": "Mind the size.", "tools": "Mind the price.", "food": "Mind the date."},
  "keywords": [
    ["clothes", ["hat", "rain coat"]],
    ["tools", ["saw", "c++"]],
    ["clothes", ["shoe"]],
    ["food", ["hat", "plum"]],
  ],
}


def task(prompt, name="a"):
  return Task(name, prompt)


@pytest.mark.parametrize(
  "prompt, names",
  [
    ("buy a HAT.", ["clothes", "food"]),
    ("buy that chat", []),
    ("a raincoat", []),
    ("a rain coat and a saw", ["clothes", "tools"]),
    ("learn c++!", ["tools"]),
    ("a shoe and a rain coat", ["clothes"]),
    ("a plum, a shoe and a saw", ["tools", "clothes", "food"]),
  ],
)
def test_a_skill_fits_by_whole_words_in_the_order_of_the_file(prompt, names):
  every = Skills(CONTENT | {"match": "all"}, where="test")
  first = Skills(CONTENT, where="test")
  assert every.matching(prompt) == names and first.matching(prompt) == names[:1]
  lines = [CONTENT["general"], *(CONTENT["skills"][name] for name in names)]
  assert every.text(task(prompt)) == "\n".join(lines)
  assert first.text(task(prompt)) == "\n".join(lines[:2])


def test_a_random_skill_is_another_one_and_depends_on_seed_and_task_alone():
  texts = [
    [Skills(CONTENT, where="test", skill="random", seed=seed).text(task("a saw", str(i)))]
    for seed in (0, 1)
    for i in range(40)
  ]
  assert {text.split("\n")[1] for (text,) in texts} == {"Mind the size.", "Mind the date."}
  assert texts[:40] != texts[40:]
  again = Skills(CONTENT, where="test", skill="random")
  assert [[again.text(task("a saw", str(i)))] for i in range(40)] == texts[:40]
  assert again.text(task("nothing known")) == "Look first."
  with pytest.raises(ValueError, match="needs two skills; test has fewer"):
    Skills(CONTENT | {"skills": {}, "keywords": []}, where="test", skill="random")


@pytest.mark.parametrize(
  "content, fault",
  [
    ([], "it holds no object"),
    ({"skills": {}, "keywords": []}, "'general' is missing"),
    (CONTENT | {"general": " "}, "'general' is missing"),
    (CONTENT | {"skills": ["a"]}, "'skills' must be {name: text}"),
    (CONTENT | {"skills": {"a": 1}}, "'skills' must be {name: text}"),
    (CONTENT | {"keywords": {"a": ["b"]}}, "'keywords' must be"),
    (CONTENT | {"keywords": [["food", []]]}, "'keywords' must be"),
    (CONTENT | {"keywords": [["food", [" "]]]}, "'keywords' must be"),
    (CONTENT | {"keywords": [["drink", ["tea"]]]}, "'keywords' names 'drink', which is no skill"),
    (CONTENT | {"match": "best"}, "'match' is 'best'"),
    (CONTENT | {"generel": "x"}, "it has ["),
  ],
)
def test_a_file_that_is_none_is_refused_in_one_line(content, fault):
  with pytest.raises(ValueError, match=re.escape(f"file.json is no file of skills: {fault}")):
    Skills(content, where="file.json")


def test_files_are_read_and_those_that_cannot_be_are_named(tmp_path):
  file = tmp_path / "skills.json"
  file.write_text(json.dumps(CONTENT))
  assert read_skills(file) == CONTENT
  env = Household(skills=str(file))
  assert env.skill_text(env.task("train", 0)) == "Look first."
  file.write_text("{")
  with pytest.raises(ValueError, match=r"skills.json' is no JSON: "):
    read_skills(file)
  with pytest.raises(ValueError, match="no.json': No such file"):
    Household(skills="no.json")
  with pytest.raises(ValueError, match="config.env.skill='other' is unknown"):
    Household(skill="other")


def test_a_task_of_the_household_has_the_lines_of_all_its_words():
  env, other = Household(), Household(skill="random")
  for index in range(50):
    one = env.task("train", index)
    words, appliances = one.data["goal"][:2]
    lines = {f"{word} means the {name}." for word, name in zip(words, appliances, strict=True)}
    general, *found = env.skill_text(one).split("\n")
    assert general == GENERAL and set(found) == lines and len(found) == len(words)
    _, *wrong = other.skill_text(one).split("\n")
    assert len(set(wrong)) == len(words) and not set(wrong) & lines
  assert len(env.skills()["skills"]) == len(meanings(0)) * 2


@pytest.mark.parametrize("file", sorted(OWN.glob("*.json")), ids=lambda file: file.name)
def test_our_own_files_are_files_of_skills(file):
  content = read_skills(file)
  Skills(content, where=file.name)
  assert {name for name, _ in content["keywords"]} == content["skills"].keys()
