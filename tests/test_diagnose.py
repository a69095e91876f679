"""Tests the check before a run: prompts, attempts made again, figures, rules, the whole mode."""

import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest

from sdpo_jax import main, summary
from sdpo_jax.config import ASSETS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.packing import Text, Texts
from sdpo_jax.data.teacher_prompt import Shown, teacher_prompt
from sdpo_jax.diagnose import advice, agreement, measures, mode, probe, tokens, verdict
from sdpo_jax.diagnose.again import Again, choose, make_again
from sdpo_jax.diagnose.prompts import ABOUT, CONTROL, OWN, SDPO, TURN, Prompt, PromptMaker
from sdpo_jax.errors import SettingError
from sdpo_jax.objectives import build
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Feedback, Rollout, Sampling, Status, Task

TASK = Task("q", "Write f(x).", solution="def f(x): return x")


@pytest.fixture(scope="module")
def chat():
  return Chat(load_tokenizer(f"{ASSETS}/tiny"))


def messages(task):
  return [{"role": "user", "content": task.prompt}]


def rollout(chat, reward, text="a wrong answer", feedback="It fails.", task=TASK, **fields):
  ids = chat.text_tokens(text)
  return Rollout(
    task,
    chat.prompt_tokens(messages(task)),
    ids,
    [-1.0] * len(ids),
    "stop",
    text,
    Feedback(reward, "" if reward >= 1 else feedback, **fields),
  )


def maker(chat, max_tokens=512, **changes):
  row = build.method_row("sdpo")
  for axis, settings in changes.items():
    row[axis] |= settings
  return PromptMaker(chat, messages, build.build_method(row), max_tokens)


# ---- prompts -------------------------------------------------------------------------------------


def test_a_failed_attempt_has_every_prompt_and_a_success_the_teachers_alone(chat):
  group = [rollout(chat, 0.0), rollout(chat, 1.0, "f = 1"), rollout(chat, 1.0, "f = 2")]
  failed, solved, _ = maker(chat).of_group(group)
  assert list(failed) == list(ABOUT)
  assert list(solved) == [CONTROL, OWN, SDPO]
  assert failed[CONTROL].tokens == group[0].prompt_tokens
  shown = {
    "feedback": Context(feedback="It fails."),
    "solution": Context(solution="f = 1"),
    "reference": Context(solution=TASK.solution),
    "both": Context(solution="f = 1", feedback="It fails."),
    "attempt": Context(attempt="a wrong answer", feedback="It fails."),
    OWN: Context(solution="f = 1"),
    SDPO: Context(solution="f = 1"),
  }
  for name, context in shown.items():
    assert failed[name].tokens == teacher_prompt(chat, messages(TASK), context, 512)[0], name
  text = chat.plain_text(failed[TURN].tokens)
  assert text.index("Write f(x).") < text.index("a wrong answer") < text.index("It fails.")


def test_prompts_without_anything_to_show_are_left_out(chat):
  task = Task("q", "Write f(x).")
  lone = [rollout(chat, 0.0, task=task), rollout(chat, 0.0, task=task, feedback="")]
  first, second = maker(chat).of_group(lone)
  assert set(first) == {CONTROL, OWN, SDPO, "feedback", "attempt", TURN}
  assert set(second) == {CONTROL}
  unjudged = [rollout(chat, 0.0, status=Status.ENV_FAILED)]
  assert maker(chat).of_group(unjudged) == [{}]


def test_a_conversation_without_room_is_left_out(chat):
  (prompts,) = maker(chat, max_tokens=48).of_group([rollout(chat, 0.0, "word " * 40)])
  assert TURN not in prompts and "feedback" in prompts


def test_a_context_whose_template_shows_nothing_says_nothing(chat):
  templates = dict(build.method_row("sdpo")["teacher_context"]["templates"])
  templates["reprompt"] = "{prompt} Solve it."
  (prompts,) = maker(chat, teacher_context=dict(templates=templates)).of_group([rollout(chat, 0.0)])
  assert prompts[OWN].says_nothing and set(prompts) == {CONTROL, OWN, TURN}
  (prompts,) = maker(chat).of_group([rollout(chat, 0.0)])
  assert not prompts[OWN].says_nothing


@pytest.mark.parametrize("name", ["crisp", "anti_sd", "pmi", "mopd"])
def test_the_other_prompts_do_not_depend_on_the_method(chat, name):
  """Some contexts have templates of their own, in which nothing else would be shown."""
  group = [rollout(chat, 0.0), rollout(chat, 1.0, "f = 1"), rollout(chat, 1.0, "f = 2")]
  method = build.build_method(build.method_row(name))
  (prompts, *_) = PromptMaker(chat, messages, method, 512).of_group(group)
  (plain, *_) = maker(chat).of_group(group)
  for other in ("feedback", "solution", "reference", "both", "attempt", SDPO, TURN):
    assert prompts[other].tokens == plain[other].tokens, other


# ---- attempts made again -------------------------------------------------------------------------


def prompts_of(*names_and_ids):
  return {name: Prompt(list(ids), None) for name, ids in names_and_ids}


def test_attempts_at_many_questions_come_first_and_the_budget_holds():
  two = prompts_of((CONTROL, [1]), (OWN, [2]), ("feedback", [2]))  # two distinct prompts
  prompts_QG = [[two, two], [two, two], [{}, two]]
  assert choose(prompts_QG, 4) == [(0, 0), (1, 0)]
  assert choose(prompts_QG, 5) == [(0, 0), (1, 0)]
  assert choose(prompts_QG, 100) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]
  assert choose(prompts_QG, 1) == []


class Echo:
  """A collector whose answers tell prompt and seed."""

  def __init__(self):
    self.asked, self._by_teacher = [], False

  @contextlib.contextmanager
  def read_by_teacher(self, by_teacher):
    self._by_teacher = by_teacher
    yield

  def collect(self, params, tasks, *, n, sampling, seeds, version, prompts):
    self.asked += list(zip(map(tuple, prompts), seeds, strict=True))
    reader = "teacher" if self._by_teacher else "policy"
    return [
      [Rollout(task, ids, [1], [0.0], reader, f"{ids} {seed}", Feedback(0.0, ""))]
      for task, ids, seed in zip(tasks, prompts, seeds, strict=True)
    ]


def test_equal_prompts_are_answered_once_and_each_attempt_has_a_control_of_its_own(chat):
  prompts = prompts_of((CONTROL, [1]), (OWN, [2]), ("feedback", [2]))
  attempts = {(0, g): (rollout(chat, 0.0), prompts) for g in range(2)}
  echo = Echo()
  first, second = make_again(echo, None, attempts, sampling=Sampling(1), path=(0,))
  assert len(echo.asked) == 4 and len(set(echo.asked)) == 4
  assert first.answers[OWN] is first.answers["feedback"]
  assert first.answers[CONTROL].text != second.answers[CONTROL].text
  readers = [first.answers[name].finish_reason for name in (CONTROL, OWN)]
  assert readers == ["policy", "teacher"]
  assert make_again(echo, None, {}, sampling=Sampling(1), path=(0,)) == []


# ---- figures -------------------------------------------------------------------------------------


def made(chat, question, reward, **answers):
  """An attempt at a question with the reward of the answer to each prompt."""
  task = Task(question, "?")
  attempt = rollout(chat, reward, task=task)
  return Again(
    attempt,
    {name: Prompt([1], None) for name in answers},
    {name: rollout(chat, x, task=task) for name, x in answers.items()},
  )


def succeeded(r):
  return r.is_judged and r.feedback.reward >= 0.5


def test_what_a_prompt_is_worth_by_hand(chat):
  attempts = [
    made(chat, "a", 0.0, control=0.0, own=1.0),
    made(chat, "a", 0.0, control=1.0, own=1.0),
    made(chat, "b", 0.0, control=0.0, own=0.0, turn=1.0),
    made(chat, "b", 1.0, control=1.0, own=0.0),
  ]
  found = measures.of_again(attempts, succeeded, chat)
  own = found["failed"][OWN]
  assert (own["reward"]["mean"], own["control"]["mean"]) == (0.5, 0.25)  # questions count alike
  assert own["difference"]["mean"] == 0.25 and own["against_own"] is None
  assert (own["attempts"], own["questions"]) == (3, 2)
  against_own = found["failed"][TURN]["against_own"]
  assert against_own == {"mean": 1.0, "low": None, "high": None, "p": None}
  assert found["solved"]["difference"]["mean"] == -1.0
  assert found["all"][OWN]["difference"]["mean"] == pytest.approx((0.5 - 0.5) / 2)
  assert found["all"][SDPO] is None


def test_answers_without_a_verdict_are_left_out(chat):
  again = made(chat, "a", 0.0, control=0.0, own=1.0)
  again.answers[OWN] = rollout(chat, 0.0, status=Status.ENV_FAILED)
  assert measures.of_again([again], succeeded, chat)["all"][OWN] is None


def test_recitals_are_copies_however_short(chat):
  shown = Shown(Context(solution="f = 1"), 1.0, [1], False)
  attempts = []
  for question, text in (("a", "f = 1\n"), ("b", "f = 2"), ("c", "g")):
    again = made(chat, question, 0.0, control=0.0, own=1.0 if question != "c" else 0.0)
    again.prompts[OWN] = Prompt([1], shown)
    again.answers[OWN].text = text
    attempts.append(again)
  assert measures.of_again(attempts, succeeded, chat)["all"][OWN]["recited"] == 0.5


def test_the_policys_figures_by_hand(chat):
  groups = [
    [rollout(chat, 1.0), rollout(chat, 0.0)],
    [rollout(chat, 0.0), rollout(chat, 0.0, status=Status.ENV_FAILED)],
  ]
  found = measures.of_policy(groups, succeeded, is_uncut=True)
  assert found["reward"]["mean"] == 0.25 and found["mixed"]["mean"] == 0.5
  assert found["solved"] == 0.5 and found["spread"] == 0.25 and found["unjudged"] == 1
  assert found["entropy"] == pytest.approx(1.0) and found["truncated"] == 0.0
  assert measures.of_policy(groups, succeeded, is_uncut=False)["entropy"] is None


def test_the_interval_of_a_difference_covers_at_its_level(chat):
  """Questions differ in how hard they are, and in what the prompt is worth there."""
  rng = np.random.default_rng(0)
  truth = 0.15 * (1 - 0.2)  # the prompt solves 15 % of what the control does not
  covered, simulations = 0, 300
  attempts = [made(chat, str(q), 0.0, control=0.0, own=0.0) for q in range(30) for _ in range(2)]
  for _ in range(simulations):
    hard_Q = rng.beta(1, 4, 30)  # mean .2
    control_QA = rng.random((30, 2)) < hard_Q[:, None]
    own_QA = rng.random((30, 2)) < (hard_Q + 0.15 * (1 - hard_Q))[:, None]
    for again, control, own in zip(attempts, control_QA.ravel(), own_QA.ravel(), strict=True):
      for name, value in ((CONTROL, control), (OWN, own)):
        object.__setattr__(again.answers[name].feedback, "reward", float(value))
    found = measures.gain(attempts, OWN)
    covered += found.low <= truth <= found.high
  assert 0.92 <= covered / simulations <= 0.98  # 95 % but for three standard errors


def test_known_answers_are_a_success_of_the_group_or_the_questions_own(chat):
  right = rollout(chat, 1.0, "f = 1")
  assert tokens.known_answer([rollout(chat, 0.0), right], succeeded, chat) == right.tokens
  own = tokens.known_answer([rollout(chat, 0.0)], succeeded, chat)
  assert own == chat.text_tokens(TASK.solution)
  task = Task("q", "?")
  assert tokens.known_answer([rollout(chat, 0.0, task=task)], succeeded, chat) is None


def reading(attempt, strings, gap, differs):
  return tokens.Reading(attempt, list(strings), gap, differs, list(strings), list(strings))


def test_figures_of_tokens_by_hand(chat):
  attempt = rollout(chat, 0.0)
  readings = [
    reading(attempt, "abcd", [0.0, 0.0, 1.0, -3.0], [False, False, True, True]),
    reading(attempt, "a", [2.0], [True]),
  ]
  answers = {
    "feedback": [
      tokens.Answer("a", [True, False], [True, True]),
      tokens.Answer("b", [False, False], [False, True]),
    ]
  }
  found = tokens.figures(readings, answers)
  assert found["gap"] == pytest.approx(6 / 5) and found["top_differs"] == pytest.approx(3 / 5)
  by_part = found["gap_by_part"]
  assert by_part[0] == pytest.approx((0 + 2) / 2) and by_part[5] == 1.0 and by_part[7] == 3.0
  right = found["right"]["feedback"]
  assert right["difference"]["mean"] == 0.5
  assert (right["by_part"]["policy"][0], right["by_part"]["policy"][5]) == (0.5, 0.0)
  assert (right["by_part"]["teacher"][0], right["by_part"]["teacher"][5]) == (0.5, 1.0)
  assert (found["followed"], found["alike"]) == ({}, None)
  assert tokens.figures([], {})["gap"] is None


def test_an_answer_that_the_prompt_shows_is_no_known_one(chat):
  """It would only be recited; the question's own solution is known beside it."""
  failed, right = rollout(chat, 0.0), rollout(chat, 1.0, "f = 1")
  group, own = [failed, right], maker(chat)
  hidden = Prompt(chat.text_tokens("no answer"), None)
  shown = Prompt(chat.text_tokens("Correct solution: f = 1"), None)
  assert tokens.unshown_answer(group, failed, hidden, own) == right.tokens
  assert tokens.unshown_answer(group, failed, shown, own) == chat.text_tokens(TASK.solution)
  assert tokens.unshown_answer(group, right, shown, own) is None
  assert tokens.unshown_answer(group, right, hidden, own) == right.tokens


class StubScorer:
  """Scores each token by its place; the likeliest next token is given, by the prompt's last id."""

  def __init__(self, likeliest):
    self.likeliest = likeliest

  def score(self, ids, *, begin, temperature, top):
    places = np.arange(len(ids) - begin)
    logp, tokens_X = self.likeliest[ids[begin - 1]]
    top_token_XM = np.array([tokens_X[i] for i in places])[:, None]
    return types.SimpleNamespace(logp_X=np.array(logp)[places], top_token_XM=top_token_XM)


def test_an_attempt_is_followed_to_where_it_departs_from_a_right_answer(chat):
  """The policy repeats the attempt 5 6 7, the teacher is right at its departure, 5 8."""
  scorer = StubScorer(
    {
      1: ([-1.0, -1.0, -1.0], [5, 6, 7]),  # the policy
      2: ([-1.0, -4.0, -2.0], [5, 8, 7]),  # the teacher
      3: ([-1.0, -2.0, 0.0], [5, 8, 7]),  # ... shown another question's context
    }
  )
  reader = tokens.TokenReader(scorer, chat, 1.0)
  attempt = dataclasses.replace(rollout(chat, 0.0), prompt_tokens=[1], tokens=[5, 6, 7])
  failed = reader.read(attempt, Prompt([2], None), answer=[5, 8, 9, 9], elsewhere=[3])
  assert failed.right == tokens.Right(False, True, [True, False], [True, True])
  assert failed.gap == [0.0, -3.0, -1.0] and failed.gap_elsewhere == [0.0, -1.0, 1.0]
  cut = reader.read(attempt, Prompt([2], None), answer=[5, 6, 7, 9])
  assert cut.right == tokens.Right(False, False, [True, True, True], [True, False, True])
  solved = reader.read(attempt, Prompt([2], None), answer=[5, 6, 7], solved=True)
  found = tokens.figures([failed, cut, solved], {})
  assert found["followed"]["failed"]["policy"] == pytest.approx((0.5 + 1.0) / 2)
  departure = found["followed"]["failed"]["departure"]
  assert (departure["answers"], departure["policy"], departure["teacher"]) == (1, 0.0, 1.0)
  assert found["followed"]["solved"]["teacher"] == pytest.approx(2 / 3)
  assert "departure" not in found["followed"]["solved"]
  assert found["alike"] == pytest.approx(1.0 / 4.0)


# ---- rules ---------------------------------------------------------------------------------------


def figures(low=0.1, mean=0.2, high=0.3, *, mixed=0.5, gap=0.5, questions=20, **own):
  """Figures as a diagnosis has them: what the teacher adds, and how many groups are mixed."""
  interval = {"mean": 0.3, "low": 0.2, "high": 0.4}
  worth = {
    "reward": interval,
    "control": interval,
    "difference": {"mean": mean, "low": low, "high": high},
    "against_own": None,
    "questions": questions,
    "copied": 0.0,
    "recited": 0.0,
  }
  nothing = {"share": 1.0, "says_nothing": 0.0, "same_as_policy": 0.0, "shortened": 0.0}
  return {
    "policy": {
      "mixed": {"mean": mixed, "low": None, "high": None},
      "reward": interval,
      "solved": 0.6,
      "truncated": 0.0,
      "entropy": 0.5,
      "unjudged": 0,
    },
    "prompts": {OWN: nothing | own, SDPO: nothing | own},
    "again": {"failed": {OWN: worth}, "solved": None, "all": {OWN: worth, SDPO: worth}},
    "tokens": {"gap": gap, "right": {}, "followed": {}, "alike": None},
    "parameters": 135e6,
  }


ROW = build.method_row("sdpo")
BETTER = dict(low=0.1, mean=0.2, high=0.3)
LITTLE = dict(low=0.01, mean=0.03, high=0.05)
NO_BETTER = dict(low=-0.09, mean=0.0, high=0.09)
UNCLEAR = dict(low=-0.05, mean=0.05, high=0.2)
WORSE = dict(low=-0.3, mean=-0.2, high=-0.1)


@pytest.mark.parametrize(
  "case, teacher, first, outlooks",
  [
    (BETTER, "better", "sdpo", ("learns from the teacher", "learns from rewards")),
    (LITTLE, "better", "sdpo_blend", ("learns from the teacher", "learns from rewards")),
    (BETTER | dict(mixed=0.0), "better", "sdpo", ("learns from the teacher", "inert: no group")),
    (NO_BETTER, "no better", "grpo", ("would hurt", "learns from rewards")),
    (UNCLEAR, "unclear", "grpo", ("may hurt", "learns from rewards")),
    (NO_BETTER | dict(mixed=0.0), "no better", "grpo", ("would hurt", "inert: no group")),
    (WORSE, "worse", "grpo", ("would hurt", "learns from rewards")),
    (BETTER | dict(share=0.02), "inert", "grpo", ("inert", "learns from rewards")),
    (BETTER | dict(says_nothing=1.0), "inert", "grpo", ("inert", "learns from rewards")),
    (BETTER | dict(same_as_policy=1.0), "inert", "grpo", ("inert", "learns from rewards")),
    (BETTER | dict(mixed=0.05), "better", "sdpo", ("learns from the teacher", "learns slowly")),
  ],
)
def test_each_state_has_its_words_and_its_order(case, teacher, first, outlooks):
  said = verdict.verdict(figures(**case), ROW)
  assert said["teacher"] == said["sdpo_teacher"] == teacher
  assert first in said["ranking"][0]
  assert sorted(sum(said["ranking"], [])) == sorted(verdict.RANKED)
  for name, words in zip(("sdpo", "grpo"), outlooks, strict=True):
    assert said["outlooks"][name].startswith(words)
  assert said["outlook"] == said["outlooks"]["sdpo"]


def test_a_teacher_that_agrees_everywhere_is_inert_and_of_an_unknown_one_no_order_is_given():
  said = verdict.verdict(figures(**BETTER, gap=0.0), ROW)
  assert said["teacher"] == "inert" and said["outlook"].startswith("inert")
  for unknown in (BETTER | dict(questions=3), dict(low=-0.05, mean=0.15, high=0.4)):
    said = verdict.verdict(figures(**unknown), ROW)
    assert said["outlook"].startswith("unknown") and said["ranking"] == []


def test_the_plain_methods_are_judged_by_sdpos_teacher_and_the_configured_one_by_its_own():
  found = figures(**NO_BETTER)
  found["again"]["all"][SDPO] = figures(**BETTER)["again"]["all"][SDPO]
  said = verdict.verdict(found, ROW | {"name": "crisp"})
  assert (said["method"], said["outlook"]) == ("crisp", "would hurt")
  assert said["ranking"][0] == ["sdpo"] and said["outlooks"]["sdpo"] == "learns from the teacher"


def test_a_frozen_teacher_that_knows_nothing_harms_less_than_a_moving_one():
  said = verdict.verdict(figures(**NO_BETTER), ROW)
  assert said["outlooks"]["sdpo, frozen teacher"] == "hardly moves"
  assert "held back" in said["outlooks"]["sdpo_blend"]


@pytest.mark.parametrize("name", sorted(build.METHODS))
def test_every_method_is_read_from_its_row(name):
  learning = verdict.Learning.of(build.method_row(name))
  method = build.build_method(build.method_row(name))
  assert learning.rewards == (method.surrogate is not None)
  assert learning.credit == (method.credit is not None)
  assert not learning.teacher or method.needs_teacher


def test_templates_that_show_nothing_are_named():
  (line,) = advice.advice(figures(**BETTER, says_nothing=0.8), "feedback_or_solution")
  assert "80% of the teacher's prompts show nothing" in line.text
  assert "--config.method.teacher_context.templates must keep {solution}" in line.text


def test_advice_names_what_is_seen_and_the_setting():
  changed = figures(**NO_BETTER)
  changed["policy"] |= {"truncated": 0.6, "entropy": 3.3, "solved": 0.01, "unjudged": 2}
  worth = changed["again"]["failed"][OWN]
  changed["again"]["failed"]["attempt"] = worth | {
    "against_own": {"mean": 0.3, "low": 0.1, "high": 0.5, "p": 0.001}
  }
  right = {"policy": 0.6, "teacher": 0.4, "difference": {"mean": -0.2, "low": -0.3, "high": -0.1}}
  changed["tokens"]["right"] = {"feedback": right}
  text = " ".join(line.text for line in advice.advice(changed, "feedback_or_solution"))
  for words in (
    "2 responses have no verdict",
    "60% of the responses are cut off: raise --config.rollout.max_new_tokens",
    "3.30 nats a token",
    "begin with easier ones",
    "show_attempt=True",
    "feedback misleads this model",
    "135 M parameters",
  ):
    assert words in text
  (*_, last) = advice.advice(changed, "peers")
  assert "--config.method.teacher_context.name=feedback_or_solution --config.me" in last.text
  unsure = changed["again"]["failed"]["attempt"]["against_own"]
  for name in ("feedback", "both"):  # of three such comparisons chance explains one
    changed["again"]["failed"][name] = worth | {"against_own": unsure | {"p": 0.9}}
  unsure["p"] = 0.03
  assert "show_attempt" not in " ".join(x.text for x in advice.advice(changed, "peers"))
  assert not advice.advice(figures(**BETTER), "feedback_or_solution")


# ---- the whole mode ------------------------------------------------------------------------------


def diagnose(tmp_path, *settings, config="configs/tinycode.py:local"):
  argv = ["sdpo_jax", f"--config={config}", "--mode=diagnose", f"--workdir={tmp_path / 'run'}"]
  return main.main([*argv, *settings])


def found_in(tmp_path):
  return json.loads((tmp_path / "run" / "diagnose" / "index.json").read_text())


def test_a_diagnosis_writes_its_page_and_keeps_its_budget(tmp_path, capsys):
  assert diagnose(tmp_path, "--config.diagnose.responses=72") == 0
  out = capsys.readouterr().out
  # six questions tell nothing
  assert "verdict on method=sdpo: unknown" in out and "likely order: " not in out
  found = found_in(tmp_path)
  assert found["policy"]["responses"] == 24
  again = found["again"]["failed"]
  assert again[CONTROL]["attempts"] >= 3
  page = (tmp_path / "run" / "diagnose" / "index.html").read_text()
  assert found["verdict"]["outlook"] in page and "Made again, shown feedback" in page
  first = (tmp_path / "run" / "diagnose" / "index.json").read_bytes()
  assert diagnose(tmp_path, "--config.diagnose.responses=72") == 0
  assert (tmp_path / "run" / "diagnose" / "index.json").read_bytes() == first


def test_a_teacher_whose_context_is_emptied_is_inert(tmp_path, capsys):
  empty = "--config.method.teacher_context.templates.reprompt={prompt} Solve it."
  assert diagnose(tmp_path, "--config.diagnose.responses=48", empty) == 0
  assert "verdict on method=sdpo: inert" in capsys.readouterr().out
  assert found_in(tmp_path)["verdict"]["reasons"][0]["rule"] == "empty_context"


def test_a_method_without_a_teacher_is_diagnosed_beside_sdpos(tmp_path, capsys):
  config = "configs/tinycode.py:method=grpo,local"
  on_one = "--config.diagnose.responses=150", "--config.mesh.fsdp=1"
  assert diagnose(tmp_path, *on_one, config=config) == 0
  out = capsys.readouterr().out
  assert "what the configured teacher reads" not in out
  assert "another success, else feedback" in out and "nats a token apart" in out
  found = found_in(tmp_path)
  assert found["verdict"]["method"] == "grpo" and OWN in found["prompts"]


def settings(*more):
  return main.parse(["main", "--config=configs/tinycode.py:local", *more])[1]


def test_attempts_are_read_without_a_diagnosis(tmp_path, monkeypatch):
  config = settings("--config.mesh.fsdp=1", "--config.diagnose.texts=3")
  monkeypatch.chdir(tmp_path)
  readings = mode.token_readings(config)
  assert len(readings) == 3 and not list(tmp_path.iterdir())  # nothing is written
  for one in readings:
    assert {len(field) for field in one[1:6]} == {len(one.attempt.tokens)}
    for i, differs in enumerate(one.top_differs):
      assert differs == (one.policy_top[i] != one.teacher_top[i])
  failed = [one.attempt.feedback.reward < 1 for one in readings]
  assert failed == sorted(failed, reverse=True) and any(any(one.gap) for one in readings)


def test_attempts_on_several_devices_are_not_read():
  with pytest.raises(SettingError, match="config.mesh lays the run over 8: set config.mesh.fsdp=1"):
    mode.token_readings(settings())


REMOTE = (
  "--config.method.teacher_weights.name=remote",
  "--config.method.teacher_weights.url=http://127.0.0.1:1",
  "--config.method.token_signal.top_k=4",
)


@pytest.mark.parametrize(
  "settings, words",
  [
    (("--config.diagnose.responses=8",), "config.diagnose.responses=8 is too small"),
    (REMOTE, "is not for --mode=diagnose"),
  ],
)
def test_what_cannot_be_diagnosed_is_refused(tmp_path, capsys, settings, words):
  assert diagnose(tmp_path, *settings) == 2
  assert words in capsys.readouterr().err


def test_the_methods_for_a_teacher_are_found():
  assert mode.teacher_row(build.method_row("grpo")) == build.method_row("sdpo")
  assert mode.teacher_row(build.method_row("mopd")) == build.method_row("mopd")


# ---- the probe during a run ----------------------------------------------------------------------


def train(directory, *settings, config="configs/tinycode.py:local"):
  status = main.main(["sdpo_jax", f"--config={config}", f"--workdir={directory}", *settings])
  lines = (directory / "metrics.jsonl").read_text().splitlines() if status == 0 else []
  return status, [json.loads(line) for line in lines]


def test_a_probe_compares_teacher_and_policy_and_leaves_the_run_as_it_is(tmp_path):
  probing = "--config.train.probe_teacher_every_steps=1", "--config.train.probe_attempts=3"
  _, plain = train(tmp_path / "plain")
  _, probed = train(tmp_path / "probed", *probing)
  for before, line in zip(plain[1:], probed[1:], strict=True):
    assert line["train/loss"] == before["train/loss"]
    assert line["train/reward"] == before["train/reward"]
    assert line["probe/attempts"] <= 3
    gained = line["probe/teacher_reward"] - line["probe/policy_reward"]
    assert -1 <= line["probe/teacher_gain"] <= 1 and abs(gained) <= 1
  assert "probe/teacher_gain" not in plain[-1]


def test_a_probe_reads_what_the_teacher_reads(chat):
  rows = [rollout(chat, 0.0), rollout(chat, 0.0), rollout(chat, 1.0)]
  texts = Texts([[Text([7, 8, 9], [(2, 3)])], [], [Text([5, 6, 9], [(1, 3)])]])
  contexts = ([Context(feedback="no"), None, Context(solution="f")],)
  packed = types.SimpleNamespace(rollouts=rows, contexts=contexts, teacher_texts=texts)
  found = probe.attempts_of(packed, 4)
  assert [(place, ids) for place, (_, ids) in found.items()] == [((0, 0), [7, 8]), ((0, 2), [5])]
  assert len(probe.attempts_of(packed, 1)) == 1


def test_a_probe_that_nothing_would_read_is_refused(tmp_path, capsys):
  config = "configs/tinycode.py:method=grpo,local"
  settings = "--config.train.probe_teacher_every_steps=1"
  assert train(tmp_path / "run", settings, config=config)[0] == 2
  assert "has no teacher" in capsys.readouterr().err


# ---- what was said, and what happened ------------------------------------------------------------


def test_orders_are_compared_by_hand():
  scores = {"sdpo": 0.9, "sdpo_blend": 0.7, "sdpo, frozen teacher": 0.6, "grpo": 0.5}
  order = [["sdpo"], ["sdpo_blend"], ["sdpo, frozen teacher"], ["grpo"]]
  assert agreement.compare(order, scores) == (1.0, pytest.approx(-3 / (6 * 3) ** 0.5))
  # two of six pairs are the other way round
  swapped = [["sdpo_blend"], ["sdpo"], ["grpo"], ["sdpo, frozen teacher"]]
  assert agreement.tau(swapped, scores) == pytest.approx((4 - 2) / 6)
  assert agreement.tau([list(scores)], scores) is None


def test_results_hold_a_diagnosis_against_its_runs(tmp_path):
  folder = tmp_path / "results" / "diagnose"
  folder.mkdir(parents=True)
  said = verdict.verdict(figures(**BETTER), ROW)
  (folder / "diagnosis_notes.json").write_text(json.dumps({"verdict": said}))
  scores = {"sdpo": (0.8, 1.0), "frozen": (0.6, 0.6), "blend": (0.7, 0.7), "grpo": (0.5, 0.5)}
  entries = {}
  for arm, by_seed in scores.items():
    for seed, score in enumerate(by_seed):
      points = [
        {"step": step, "time_s": 1.0, "train/generations": 1, "train/sampled_tokens": 1}
        | {f"eval/heldout/avg@k{end}": score for end in ("", "_low", "_high")}
        for step in (0, 1)
      ]
      argument = f"--config=configs/tinycode.py:method=x,seed={seed}"
      entries[f"{arm}_on_notes_seed{seed}"] = {"arguments": [argument], "points": points}
  (folder / "curves.json").write_text(json.dumps(entries))
  page = summary.text(tmp_path)
  assert "sdpo 90.0 (80.0 to 100.0), sdpo_blend 70.0" in page
  assert "### notes" in page and "| heldout | `sdpo` | 2 | 90.0 |" in page
  assert "| 1.00 | -0.71 |" in page and "| **1.00** | **-0.71** |" in page
