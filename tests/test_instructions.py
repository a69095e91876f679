"""The generator of short instructions: splits that never meet, constraints that can be followed."""

import collections
import itertools
import random

import pytest

from sdpo_jax.envs import ifeval_conflicts
from sdpo_jax.envs.instruction_words import (
  DISTRACTIONS,
  KINDS,
  REQUESTS,
  TOPIC_WORD,
  TOPICS,
)
from sdpo_jax.envs.instructions import COUNTS, SPLITS, Instructions, has_unseen_pair
from sdpo_jax.records import Task

MANY = {split: [Instructions().task(split, i) for i in range(2000)] for split in SPLITS}


def kinds_of(task):
  return task.data["kind"].split(" + ")


def test_a_question_is_a_function_of_split_and_index():
  again = Instructions()
  for split in SPLITS:
    assert [again.task(split, i) for i in (1999, 7, 0)] == [MANY[split][i] for i in (1999, 7, 0)]
    assert len({task.id for task in MANY[split]}) == 2000
  assert Instructions().prompt(MANY["tune"][3]) == [
    {"role": "user", "content": MANY["tune"][3].prompt}
  ]
  with pytest.raises(ValueError, match="split='test' is unknown.*'heldout'"):
    again.task("test", 0)


def test_splits_do_not_overlap():
  """No question, and no topic with the same kinds of constraint, is in two of them."""
  for key in (lambda t: t.prompt, lambda t: (t.data["topic"], *kinds_of(t))):
    seen = {split: {key(task) for task in tasks} for split, tasks in MANY.items()}
    assert not any(seen[a] & seen[b] for a, b in itertools.combinations(SPLITS, 2))
  assert len({task.prompt for task in MANY["heldout"][:100]}) == 100


def test_pairs_of_unseen_are_in_no_other_split():
  def pairs(split):
    return {p for task in MANY[split] for p in itertools.combinations(kinds_of(task), 2)}

  others = set().union(*(pairs(split) for split in SPLITS if split != "unseen"))
  own = {pair for pair in pairs("unseen") if has_unseen_pair(pair)}
  assert len(own) >= 8 and not own & others and len(others) > 40
  assert all(any(set(p) <= set(kinds_of(task)) for p in own) for task in MANY["unseen"])


def test_no_two_constraints_exclude_each_other():
  for task in itertools.chain(*MANY.values()):
    assert ifeval_conflicts.find(task.data["constraints"]) is None, task.prompt
    groups = [KINDS[kind].group for kind in kinds_of(task)]
    assert len(set(groups)) == len(groups) == task.data["difficulty"]
    assert len(task.data["constraints"]) == task.data["difficulty"] + 1


def test_every_kind_and_number_of_constraints_occurs():
  for split, tasks in MANY.items():
    assert {kind for task in tasks for kind in kinds_of(task)} == set(KINDS)
    counts = collections.Counter(task.data["difficulty"] for task in tasks)
    if split != "unseen":  # which has no single ones
      assert all(counts[n] == pytest.approx(2000 * COUNTS[n], abs=80) for n in COUNTS)


def test_every_question_demands_a_word_of_its_topic():
  """No text that stays the same is right for more than a few questions."""
  env = Instructions()
  for split, tasks in MANY.items():
    for task in tasks:
      name, arguments = task.data["constraints"][0]
      (word,) = arguments["keywords"]
      assert name == "keywords:existence" and word.lower() == task.data["topic"].split()[-1]
      assert word in task.prompt
      assert env.judge(task, "").reward == 0.0, (split, task.prompt)
  constant = '"* warm\n* calm"'  # two bullets in quotation marks
  tasks = MANY["heldout"]
  assert sum(env.judge(task, constant).reward for task in tasks) / len(tasks) < 0.02


def test_a_text_that_is_demanded_has_the_case_that_is_demanded():
  for task in itertools.chain(*MANY.values()):
    texts = []
    for _, arguments in task.data["constraints"]:
      for key, value in arguments.items():
        texts += value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if key == "relation":
          assert texts.pop() in ("less than", "at least")
    small, capital = (kind in kinds_of(task) for kind in ("small_letters", "capitals"))
    assert not small or all(text == text.lower() for text in texts), task.prompt
    assert not capital or all(text == text.upper() for text in texts), task.prompt


SENTENCE = "A @ day by the sea is a joy"  # no comma, no full stop
# kind: an answer that follows it with these arguments, and one that does not; @ stands for the word
# of the topic
FOLLOWED = {
  "small_letters": lambda: ("a @ day by the sea is a joy.", f"{SENTENCE}."),
  "capitals": lambda: (f"{SENTENCE}.".upper(), f"{SENTENCE}."),
  "no_comma": lambda: (SENTENCE, "A @, warm and bright."),
  "few_words": lambda num_words, relation: ("@ " * (num_words - 1), "@ " * num_words),
  "many_words": lambda num_words, relation: ("@ " * num_words, "@ " * (num_words - 1)),
  "few_sentences": lambda num_sentences, relation: (
    "It is @. " * (num_sentences - 1),
    "It is @. " * num_sentences,
  ),
  "bullets": lambda num_bullets: ("* @\n" * num_bullets, "* @\n" * (num_bullets + 1)),
  "keywords": lambda keywords: (f"{SENTENCE}: {' '.join(keywords)}", SENTENCE),
  "repeated": lambda keyword, frequency, relation: (f"@: {keyword} {keyword}", f"@: {keyword}"),
  "forbidden": lambda forbidden_words: (SENTENCE, f"{SENTENCE} {forbidden_words[-1]}."),
  "quotation": lambda: (f'"{SENTENCE}."', f'"{SENTENCE}." That is it.'),
  "ending": lambda end_phrase: (f"{SENTENCE}. {end_phrase}", f"{end_phrase} {SENTENCE}."),
  "title": lambda: (f"<<Calm>>\n{SENTENCE}.", f"<Calm>\n{SENTENCE}."),
  "first_word": lambda first_word, **_: (f"{first_word} @ it rains.", f"@ rains {first_word}."),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_knows_right_from_wrong(kind):
  tasks = [task for tasks in MANY.values() for task in tasks if task.data["kind"] == kind]
  assert len(tasks) > 20
  env = Instructions()
  for task in tasks[:20]:
    (_, topic), (name, arguments) = task.data["constraints"]
    (word,) = topic["keywords"]
    right, wrong = (text.replace("@", word) for text in FOLLOWED[kind](**arguments))
    assert env.judge(task, right).reward == 1.0, (task.prompt, right)
    feedback = env.judge(task, wrong)
    assert feedback.reward == 0.0 and f"- {name}: " in feedback.text
    assert KINDS[kind].constraint == name


def test_a_question_with_several_constraints_wants_them_all():
  task = next(t for t in MANY["unseen"] if t.data["kind"] == "bullets + no_comma")
  (count,) = (a["num_bullets"] for _, a in task.data["constraints"] if "num_bullets" in a)
  env = Instructions()
  word = task.data["topic"].split()[-1]
  assert env.judge(task, f"- {word}\n" * count).reward == 1.0
  assert "1 of 3" in env.judge(task, f"- {word}, warm\n" * count).text


def words_of(task: Task, wordings):
  """The given wordings of the constraints of a task, with its arguments."""
  topic, *others = task.data["constraints"]
  by_name = {KINDS[kind].constraint: KINDS[kind] for kind in kinds_of(task)}
  kinds = [(TOPIC_WORD, topic[1]), *((by_name[name], arguments) for name, arguments in others)]
  for kind, arguments in kinds:
    texts = {k: ", ".join(v) if isinstance(v, list) else v for k, v in arguments.items()}
    yield [text.format(**texts) for text in wordings(kind)]


def test_adversarial_questions_say_it_otherwise():
  twisted = collections.Counter()
  for split, tasks in MANY.items():
    for task in tasks:
      usual = [any(w in task.prompt for w in ws) for ws in words_of(task, lambda k: k.wordings)]
      other = [any(w in task.prompt for w in ws) for ws in words_of(task, lambda k: k.others)]
      distracted = any(text in task.prompt for text in DISTRACTIONS)
      first = any(task.prompt.startswith(text.format(task.data["topic"])) for text in REQUESTS)
      if split == "adversarial":
        assert all(other) and not any(usual), task.prompt
        twisted[distracted, first] += 1
      else:
        assert all(usual) and not any(other) and first and not distracted, task.prompt
  # in another order, with a distraction, or both
  assert set(twisted) == {(True, True), (True, False), (False, False)}
  assert min(twisted.values()) > 500


def test_the_words_are_varied_and_fit_together():
  assert len(TOPICS) == len(set(TOPICS)) >= 150
  texts = [text for kind in KINDS.values() for text in (*kind.wordings, *kind.others)]
  assert len(texts) == len(set(texts)) and all("{}" in request for request in REQUESTS)
  for kind in KINDS.values():
    rng = random.Random(0)
    assert len(kind.wordings) == len(kind.others) == 2
    assert all(text.format(**kind.draw(rng)) for text in (*kind.wordings, *kind.others))
