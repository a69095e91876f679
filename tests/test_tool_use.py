"""Tool calls: form, equality, what feedback says and never says, and every ToolAlpaca row."""

import itertools
import json
import os
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from sdpo_jax.envs.tool_use import ToolUse, parse, render
from sdpo_jax.records import Status

_DATA = os.environ.get("SDPO_JAX_DATA")
needs_data = pytest.mark.skipif(_DATA is None, reason="SDPO_JAX_DATA is unset: no tool-use rows")

TOOLS = (
  "Name: T\nDocumentation:\n"
  "find: Find it.\nParameters: {}\nOutput: x\n"
  "book: Book it.\nIn two lines.\nParameters: {}\nOutput: x\n"
  "\nBegin!\nQuestion: go"
)


def row(*calls):
  return {
    "idx": 1,
    "kind": "tooluse",
    "dataset": "tooluse",
    "prompt": TOOLS,
    "answer": json.dumps([{"Action": a, "Action_Input": json.dumps(i)} for a, i in calls]),
  }


TASK = ToolUse().task_from_row(
  row(
    ("find", {"city": "Rome", "n": 1, "deep": {"list": [1, {"x": None}], "flag": True}}),
    ("find", {"city": "Bern"}),
    ("book", {}),
  ),
  "test",
)
RIGHT = TASK.solution


@pytest.mark.parametrize(
  "response",
  [
    RIGHT,
    "Thought: hm\n" + RIGHT.replace("Action Input: {", "Action Input:\n{") + "\nObservation: ok",
    RIGHT.replace("{", "{\n  ").replace("\n", "\r\n"),
    "<think>Action: no</think>" + RIGHT,
    "Action: book\n"  # a tool without arguments needs no input
    'Action: find\nAction Input: ```json\n{"city": "Bern"}\n```\n'
    'Action: find\nAction Input: {"n": 1.0, "city": "Rome", '
    '"deep": {"flag": true, "list": [1, {"x": null}]}}',
  ],
)
def test_right_responses(response):
  assert ToolUse().judge(TASK, response).reward == 1.0


# What only the merged rule takes for right: (reference, response, what the other rule says).
MERGED = {
  "overridden": (
    [("find", {"city": "Rome", "n": 1}), ("find", {"city": "Bern"}), ("book", {})],
    'Action: book\nAction Input: {}\nAction: find\nAction Input: {"n": 1.0}\n'
    'Action: find\nAction Input: ```json\n{"city": "Bern"}\n```',
    "Call 1 of 'find': 1 expected argument is missing.",
  ),
  "one_call_twice": (
    [("find", {"city": "Rome"}), ("find", {"city": "Bern"})],
    'Action: find\nAction Input: {"city": "Oslo"}\nAction: find\nAction Input: {"city": "Bern"}',
    "Call 1 of 'find': The argument 'city' has a wrong value: \"Oslo\".",
  ),
  "in_the_wrong_call": (
    [("find", {"a": 1}), ("book", {"b": 2})],
    'Action: find\nAction Input: {"b": 2}\nAction: book\nAction Input: {"a": 1}',
    "The argument 'b' should not be given.",
  ),
  "all_in_one": (
    [("find", {"a": 1}), ("book", {"b": 2})],
    'Action: find\nAction Input: {"a": 1, "b": 2}\nAction: book',
    "The argument 'b' should not be given.",
  ),
  "before_the_action": (
    [("find", {"a": 1})],
    'Action Input: {"a": 1}\nAction: find',
    "An Action Input stands before the first Action.",
  ),
  "two_inputs": (
    [("find", {"a": 1, "b": 2})],
    'Action: find\nAction Input: {"a": 1}\nAction Input: {"b": 2}',
    "1 Action has several inputs.",
  ),
}


@pytest.mark.parametrize("name", MERGED)
def test_calls_keep_their_own_arguments_unless_they_are_merged(name):
  reference, response, says = MERGED[name]
  task = ToolUse().task_from_row(row(*reference), "test")
  assert ToolUse(arguments="merged").judge(task, response).reward == 1.0
  feedback = ToolUse().judge(task, response)
  assert feedback.reward == 0.0 and says in feedback.text


def test_calls_are_paired_in_any_order_and_repeated_calls_are_counted():
  cities = [("find", {"city": city}) for city in ("Rome", "Bern", "Rome")]
  task = ToolUse().task_from_row(row(*cities), "test")
  for order in itertools.permutations(cities):
    response = ToolUse().task_from_row(row(*order), "test").solution
    assert ToolUse().judge(task, response).reward == 1.0
    feedback = ToolUse().judge(task, response.replace("Bern", "Rome"))
    assert feedback.reward == 0.0 and "has a wrong value" in feedback.text
    assert ToolUse().judge(task, response.replace("Rome", "Bern", 1)).reward == 0.0


def test_a_rule_that_does_not_exist():
  with pytest.raises(ValueError, match="config.env.arguments='any' is unknown; choose from"):
    ToolUse(arguments="any")


WRONG = {
  "empty": ("", "empty"),
  "prose": ("I would call find.", "calls no tool"),
  "thinking": ("<think>" + RIGHT, "thinking"),
  "no_name": ("Action: \nAction Input: {}", "names no tool"),
  "broken_json": (RIGHT.replace("true", "True"), "Action Input 1 is not valid JSON"),
  "nan": (RIGHT.replace('"n": 1', '"n": NaN'), "Action Input 1 is not valid JSON: NaN"),
  "cut": (RIGHT[:-1], "Action Input 3 is not valid JSON"),
  "list": (RIGHT.replace("Input: {}", "Input: []"), "Action Input 3 is not a JSON object"),
  "deep": ("Action: find\nAction Input: " + "[" * 100000, "not valid JSON"),
  "unknown_tool": (RIGHT.replace("book", "buy"), "There is no tool 'buy'."),
  "once_too_often": (RIGHT + "\nAction: book\nAction Input: {}", "'book' is called 2 times"),
  "one_missing": (RIGHT.rpartition("Action: book")[0], "1 expected action is missing."),
  "wrong_value": (
    RIGHT.replace("Bern", "Oslo"),
    "The argument 'city' has a wrong value: \"Oslo\".",
  ),
  "one_is_not_true": (RIGHT.replace("true", "1"), "'deep' has a wrong value"),
  "text_is_not_a_number": (RIGHT.replace('"n": 1', '"n": "1"'), "'n' has a wrong value: \"1\""),
  "nested": (RIGHT.replace("null", "0"), "'deep' has a wrong value"),
  "extra_argument": (RIGHT.replace('"n"', '"m": 2, "n"'), "'m' should not be given"),
  "argument_missing": (RIGHT.replace('"n": 1, ', ""), "1 expected argument is missing."),
  "order": (
    RIGHT.replace("Rome", "x").replace("Bern", "Rome"),
    "'city' has a wrong value: \"Rome\"",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_responses_are_told_what_does_not_match(name):
  response, says = WRONG[name]
  feedback = ToolUse().judge(TASK, response)
  assert feedback.reward == 0.0 and feedback.status is Status.SCORED and says in feedback.text


def test_deeply_nested_arguments_are_a_wrong_answer():
  for depth in range(50, 1100, 10):
    for deep in ("[" * depth + "]" * depth, '{"x": ' * depth + "1" + "}" * depth):
      feedback = ToolUse().judge(TASK, RIGHT.replace("null", deep))
      assert (feedback.reward, feedback.status) == (0.0, Status.SCORED) and feedback.text
  calls = row(("find", {"a": json.loads("[" * 600 + "]" * 600)}))
  feedback = ToolUse().judge(
    ToolUse().task_from_row(calls, "test"),
    'Action: find\nAction Input: {"a": ' + "[" * 600 + "1" + "]" * 600 + "}",
  )
  assert feedback.reward == 0.0 and feedback.text


def test_a_known_tool_that_should_not_be_called():
  task = ToolUse().task_from_row(row(("find", {})), "test")
  assert (
    "'book' should not be called here"
    in ToolUse().judge(task, "Action: book\nAction Input: {}").text
  )
  assert task.data["tools"] == ["find", "book"]


def test_optional_calls_may_be_left_out():
  task = ToolUse().task_from_row(row(("find", {"a": 1}), ("[Optional]book", {"b": 2})), "test")
  find, both = (
    'Action: find\nAction Input: {"a": 1}',
    'Action: find\nAction Input: {"a": 1}\nAction: book\nAction Input: {"b": 2}',
  )
  assert [ToolUse().judge(task, r).reward for r in (find, both, both.replace("2", "3"))] == [
    1.0,
    1.0,
    0.0,
  ] and task.solution == both


def test_the_answer_is_revealed_only_when_asked():
  secret = ToolUse().task_from_row(
    row(("hidden_tool", {"secret_key": "secret value", "same": "hidden same"})), "test"
  )
  responses = [w for w, _ in WRONG.values()] + [
    'Action: find\nAction Input: {"same": 1}',
    "Action: hidden\nAction Input: {}",
  ]
  for response in responses:
    text = ToolUse().judge(secret, response).text
    assert text and not any(
      word in text for word in ("hidden_tool", "secret_key", "secret value", "hidden same")
    )
    assert (
      ToolUse(reveal_answer=True)
      .judge(secret, response)
      .text.endswith("Expected:\n" + secret.solution)
    )


@pytest.mark.parametrize(
  "change, says",
  [
    ({"answer": None}, "'answer' is missing"),
    ({"answer": "[{"}, "'answer' is not a list"),
    ({"answer": "[]"}, "'answer' holds no call"),
    ({"answer": '[{"Action": "a"}]'}, "'answer'.*Action_Input"),
    ({"answer": '[{"Action": "a", "Action_Input": "[]"}]'}, "'answer'"),
    ({"answer": '[{"Action": "a", "Action_Input": "{"}]'}, "'answer'"),
    ({"answer": '[{"Action": "[Optional]", "Action_Input": "{}"}]'}, "'answer'.*of one line"),
    ({"answer": [{"Action": "a\nb", "Action_Input": {}}]}, "'answer'.*of one line"),
    ({"answer": [{"Action": ["a"], "Action_Input": {}}]}, "'answer'.*needs a name"),
    ({"answer": ["a"]}, "'answer'"),
    ({"answer": float("nan")}, "'answer' is missing"),
    ({"answer": [{"Action": "a", "Action_Input": {"n": float("nan")}}]}, "'answer'.*not JSON"),
    ({"answer": [{"Action": "a", "Action_Input": '{"n": [NaN]}'}]}, "'answer'.*not JSON"),
    ({"answer": [{"Action": "a", "Action_Input": {"n": {1, 2}}}]}, "'answer'.*not JSON"),
    ({"answer": "[" * 100_000}, "'answer'"),
    (
      {"answer": [{"Action": f"{'[Optional]' * (i > 0)}a", "Action_Input": {}} for i in range(9)]},
      "'answer' holds 8 optional calls",
    ),
    ({"prompt": 3}, "'prompt' is of type int"),
    ({"kind": "mcq"}, "'kind'"),
  ],
)
def test_a_malformed_row_names_its_field(change, says):
  with pytest.raises(ValueError, match=says):
    ToolUse().task_from_row(row(("a", {})) | change, "train")


def responses():
  """Random texts, and right responses with random changes."""
  pieces = st.sampled_from(
    ["Action: find\n", "Action Input: ", "{", "}", '{"city": "Bern"}', "[", "</think>", "Action:"]
    + [RIGHT, "\n", "1e999", "NaN", "9" * 5000, "\ud800", '"\\ud800"', "```json", "\0"]
  )
  mixed = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=20).map("".join)
  cuts = st.tuples(st.integers(0, len(RIGHT)), st.integers(0, 3), st.text(max_size=3))
  changed = cuts.map(lambda cut: RIGHT[: cut[0]] + cut[2] + RIGHT[cut[0] + cut[1] :])
  return st.one_of(mixed, changed)


def judges_anything(examples):
  @settings(max_examples=examples, deadline=None, database=None)
  @given(responses(), st.sampled_from(["per_call", "merged"]), st.booleans())
  def check(response, rule, reveal):
    feedback = ToolUse(arguments=rule, reveal_answer=reveal).judge(TASK, response)
    assert feedback.reward in (0.0, 1.0) and feedback.status is Status.SCORED
    assert (feedback.text == "") == (feedback.reward == 1.0)

  check()


def test_any_response_ends_in_feedback():
  judges_anything(200)


@pytest.mark.slow
def test_ten_thousand_responses_end_in_feedback():
  judges_anything(10_000)


@pytest.mark.parametrize(
  "piece", ["Action: find\n", "Action Input: {}\n", "Action: a\nAction Input: {\n", "Action", "{"]
)
@pytest.mark.parametrize("rule", ["per_call", "merged"])
def test_no_response_takes_quadratic_time(piece, rule):
  begun = time.monotonic()
  ToolUse(arguments=rule).judge(
    TASK, "Action: find\nAction Input: " + piece * (60_000 // len(piece))
  )
  assert time.monotonic() - begun < 1.0


def broken(calls):
  """Kinds of wrong response made from a right one: (name, response)."""

  def changed(i, **new):
    return [c | new if j == i else c for j, c in enumerate(calls)]

  last, text = len(calls) - 1, render(calls)
  yield "empty", ""
  yield "prose", "The answer is " + calls[0]["name"]
  yield "thinking", "<think>\n" + text
  yield "first_missing", render(calls[1:]) or "Thought: nothing"
  yield "twice", text + "\n" + render(calls[:1])
  yield "unknown_tool", render(changed(0, name="no_such_tool"))
  yield (
    "extra_argument",
    render(changed(last, arguments=calls[last]["arguments"] | {"no_such_argument": 1})),
  )
  yield "cut", text[:-1]
  yield "list", render(changed(last, arguments=[]))
  yield "not_json", text.replace("Action Input: {", "Action Input: {'a': ", 1)
  yield "name_and_arguments_in_one_line", text.replace("\nAction Input: ", " ")
  yield "no_keyword", text.replace("Action: ", "Tool: ").replace("Action Input: ", "Input: ")
  merged = {k: v for c in calls for k, v in c["arguments"].items()}
  if merged:
    key = next(k for k in reversed(calls[last]["arguments"] or merged))
    index = max(i for i, c in enumerate(calls) if key in c["arguments"])
    yield (
      "wrong_value",
      render(changed(index, arguments=calls[index]["arguments"] | {key: "no such value"})),
    )
    yield "arguments_missing", "\n".join(f"Action: {c['name']}\nAction Input: {{}}" for c in calls)


@needs_data
def test_every_row_right_and_wrong():
  env, rows, right, wrong, kinds = ToolUse(), 0, 0, 0, set()
  with open(os.path.join(_DATA, "tooluse", "test.jsonl"), encoding="utf-8") as lines:
    for line in lines:
      task = env.task_from_row(json.loads(line), "test")
      rows += 1
      right += env.judge(task, "Thought: I know.\n" + task.solution).reward == 1.0
      assert parse(task.solution)[0] == [c["name"] for c in task.data["calls"]]
      for kind, response in broken([c for c in task.data["calls"] if not c["optional"]]):
        feedback = env.judge(task, response)
        assert feedback.reward == 0.0 and feedback.status is Status.SCORED and feedback.text, (
          task.id,
          kind,
        )
        assert ToolUse(arguments="merged").judge(task, response).reward == 0.0, (task.id, kind)
        # no value of the reference is said unless the response said it
        for call in task.data["calls"]:
          for value in call["arguments"].values():
            assert (
              not isinstance(value, str)
              or len(value) < 6
              or value not in feedback.text
              or value in response
            ), (task.id, kind)
        wrong += 1
        kinds.add(kind)
  assert (rows, right, len(kinds)) == (68, 68, 14) and wrong >= 68 * 12, (rows, right, wrong)
