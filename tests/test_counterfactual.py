"""Counterfactual self-distillation: which alternatives count, what the teacher is told of them, and
what that adds to the loss.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpo_jax import alternatives, config, errors, learner, main, train
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.shapes import Shapes
from sdpo_jax.envs.tinycode import SHOWN, TinyCode, program
from sdpo_jax.objectives import build, reference
from sdpo_jax.objectives.notes import Notes, differing, distinct, further_readings
from sdpo_jax.objectives.teacher_context import FEEDBACK, Context, FeedbackOrSolution
from sdpo_jax.records import Alternative, Feedback, Reading, Rollout, Sampling, Status, Task
from sdpo_jax.rollout import Collector
from sdpo_jax.sandbox import Sandbox
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent
CHAT = Chat(fakes.ByteTokenizer())
SAMPLING = Sampling(32, stop_tokens=(257,))
say = lambda text: CHAT.text_tokens(text) + [257]


def rollout(
  text, reward=0.0, feedback=None, status=Status.SCORED, task=Task("t/0", "Say it."), logp=None
):
  tokens = say(text)
  return Rollout(
    task,
    CHAT.prompt_tokens([{"role": "user", "content": task.prompt}]),
    tokens,
    logp or [-1.0] * len(tokens),
    "stop",
    text,
    Feedback(
      reward, ("" if reward else "wrong: " + text) if feedback is None else feedback, status
    ),
  )


def told(attempt, *alternatives, **settings):
  """The attempt, with these alternatives left after duplicates."""
  attempt.alternatives = distinct(
    list(alternatives),
    attempt,
    most=Notes(**settings).alternatives,
    success_threshold=0.5,
    behaviour=lambda r: (r.feedback.reward, r.feedback.text),
  )
  return attempt


def read(attempt, group=None, **settings):
  group = group or [attempt]
  return further_readings(Notes(**settings), FeedbackOrSolution(), group, group.index(attempt))


verified = lambda *args, **kwargs: Alternative(rollout(*args, **kwargs), "samples")


def test_one_alternative_for_each_behaviour_and_none_like_the_attempt():
  attempt = rollout("a", feedback="is 1")
  others = [
    verified("a", feedback="says the same"),
    verified("a2", feedback="is 1"),
    verified("b", feedback="is 2"),
    verified("b2", feedback="is 2"),
    verified("broken", status=Status.ENV_FAILED),
    verified("c", reward=1.0),
    verified("c2", reward=1.0),
    verified(" b\n", feedback="is 3"),
  ]
  # a success comes first
  assert [a.rollout.text for a in told(attempt, *others, alternatives=9).alternatives] == ["c", "b"]
  assert [a.rollout.text for a in told(attempt, *others, alternatives=1).alternatives] == ["c"]
  imagined = [
    Alternative(rollout(t, feedback="is 1"), "samples", "perhaps") for t in ("a", "b", "b", "c")
  ]
  # what it does is not known
  assert [a.rollout.text for a in told(attempt, *imagined, alternatives=9).alternatives] == [
    "b",
    "c",
  ]


def test_a_note_says_what_the_differing_lines_would_have_received():
  attempt = rollout("def f(x):\n  x = 1\n  return x", feedback="is 1")
  told(
    attempt,
    verified(
      "<think>hm</think>def f(x):\n  x = 2\n  y = {x}\n  return x", feedback="is " + fakes.NASTY
    ),
  )
  ((context, weight),) = read(attempt)
  assert context.feedback == "is 1" and weight == 1.0
  assert (
    context.notes == "\nIf you had tried\n  x = 2\n  y = {x}\ninstead of\n  x = 1\n"
    f"you would have received\nis {fakes.NASTY}"
  )
  assert context.render("Q").startswith("Q\nThe following is feedback") and context.render(
    "Q"
  ).endswith(context.notes + "\n\nCorrectly solve the original question.")
  # a line of each stays
  assert differing("a\nb", "a") == ("a\nb", "a") and differing("a\nb\nc", "a\nc") == ("b\nc", "c")


def test_a_verified_success_is_used_as_a_solution():
  attempt, success = rollout("a"), rollout("<think>hm</think>c", reward=1.0)
  told(attempt, Alternative(success, "samples"), verified("b"))
  for settings in (
    {},
    {"feedback": "always"},
    {"use_solution": False},
    {"demonstration": "shortest"},
  ):
    context = FeedbackOrSolution(**settings)
    ((found, _),) = further_readings(Notes(), context, [attempt], 0)
    assert (
      Context(found.solution, found.feedback) == context([attempt, success], 0)
      and "wrong: b" in found.notes
      and "<think>" not in found.notes
    )
  # nobody ran it: it is told, with its imagined feedback
  imagined = told(rollout("a"), Alternative(success, "samples", "Correct"))
  ((found, weight),) = read(imagined, feedback="imagined", kappa=0.25, eta=2.0)
  assert (
    not found.solution
    and "c\ninstead of\na\nyou would have received\nCorrect" in found.notes
    and weight == 0.5
  )
  group = [told(rollout("a"), Alternative(success, "samples")), rollout("d", reward=1.0)]
  # the group has a solution already: nothing more is told
  assert read(group[0], group) == [None]


def test_where_the_plain_teacher_reads_nothing_the_settings_of_its_context_hold():
  """With feedback="never" and no success the notes are all that is shown: in the user's own words,
  with the attempt if asked for.
  """
  c = config.load(f"{ROOT}/configs/counterfactual.py:domain=math_qa,note=feedback")
  for show_attempt in (False, True):
    c.method.teacher_context.show_attempt = show_attempt
    c.method.teacher_context.templates.reprompt = "{prompt}{attempt}{notes} Again."
    ((context, _),) = learner.make_learner(c, fakes.toy_config()).further_readings(
      [told(rollout("a"), verified("b"))], 0
    )
    assert (
      context.render("Q")
      == "Q" + "\nYour earlier attempt:\n\na" * show_attempt + FEEDBACK + "wrong: b Again."
    )
    silent = told(rollout("a"), verified("b", feedback="", reward=0.1))
    # nothing was said of it
    assert learner.make_learner(c, fakes.toy_config()).further_readings([silent], 0) == [None]
  row = build.method_row("counterfactual")
  row["teacher_context"]["templates"]["reprompt"] = "{prompt}{feedback}"
  with pytest.raises(
    ValueError,
    match=r"method.teacher_context.templates.reprompt='{prompt}{feedback}' has no {notes}",
  ):
    build.build_method(row)
  build.build_method(row | dict(counterfactual=dict(name="none")))


def test_weights_and_readings():
  attempt = told(
    rollout("a"), verified("b"), Alternative(rollout("c"), "samples", "no"), alternatives=3
  )
  ((joint, weight),) = read(attempt, alternatives=3, eta=0.5, kappa=0.5)
  assert weight == 0.5 * 0.75 and "wrong: b" in joint.notes and "\nno" in joint.notes
  one, two, none = read(attempt, alternatives=3, eta=0.5, kappa=0.5, form="each")
  assert (one[1], two[1], none) == (0.25, 0.125, None) and one[0].notes + two[
    0
  ].notes == joint.notes
  assert read(rollout("a")) == [None] and read(
    rollout("a", reward=1.0), alternatives=2, form="each"
  ) == [None, None]
  mixed = read(attempt, alternatives=3, eta=0.5, kappa=0.5, form="mixture")
  assert [r and r[1] for r in mixed] == [0.5, 0.25, None] and [r and r[0] for r in mixed] == [
    one[0],
    two[0],
    None,
  ]
  # nothing to mix with
  silent = FeedbackOrSolution(feedback="never", use_solution=False)
  assert further_readings(Notes(form="mixture"), silent, [attempt], 0) == [None, None]
  assert not any(Notes(**nothing).teaches for nothing in (dict(eta=0.0), dict(alternatives=0)))
  assert not Notes(sources=()).teaches
  for wrong in (
    dict(eta=-1.0),
    dict(kappa=1.5),
    dict(feedback="dreamt"),
    dict(form="either"),
    dict(sources=("cousins",)),
    dict(imagined_tokens=0),
    dict(gate=True, form="mixture"),
    dict(feedback="imagined", sources=("siblings",)),
    dict(kappa=0.25),
    dict(imagined_tokens=128),
    dict(imagined_tokens=128, feedback="opposite"),
  ):
    with pytest.raises(ValueError, match=f"method.counterfactual.{next(iter(wrong))}"):
      build.build_method(
        build.method_row("counterfactual") | dict(counterfactual=dict(name="notes", **wrong))
      )
  with pytest.raises(ValueError, match="set method.token_signal.top_k"):
    build.build_method(
      build.method_row("counterfactual") | dict(counterfactual=dict(name="notes", form="mixture"))
    )
  with pytest.raises(ValueError, match="teacher context 'feedback_or_solution'"):
    build.build_method(build.method_row("grpo") | dict(counterfactual=dict(name="notes")))


def explorer(collector, second_model=None, **settings):
  return alternatives.Explorer(
    Notes(**settings),
    collector,
    seed=0,
    success_threshold=0.5,
    max_prompt_tokens=400,
    second_model=second_model,
  )


def explored(groups, script, answers, other=None, sampling=SAMPLING, **settings):
  collector = Collector(
    fakes.ListEnv(answers),
    CHAT,
    fakes.ScriptedEngine(script),
    max_prompt_tokens=300,
    judge_threads=2,
    judge_timeout_s=5.0,
  )
  asked = []
  generate = collector.engine.generate
  collector.engine.generate = lambda requests: (
    asked.append([request.prompt for request in requests]),
    generate(requests),
  )[1]
  try:
    metrics = explorer(collector, other, **settings).explore(
      None, groups, sampling=sampling, step=1
    )
  finally:
    collector.close()
  return metrics, asked


def test_samples_are_drawn_once_a_question_and_siblings_cost_nothing():
  groups = [[rollout("a"), rollout("right", 1.0), rollout("b")], [rollout("right", 1.0)] * 3]
  metrics, asked = explored(
    groups,
    [[say("b"), say("right"), say("b")]],
    {"right": Feedback(1.0, "")},
    sources=("samples", "siblings"),
    alternatives=3,
  )
  assert asked == [[groups[0][0].prompt_tokens]]  # the solved question is not asked again
  assert [(a.rollout.text, a.source) for a in groups[0][0].alternatives] == [
    ("right", "samples"),
    ("b", "samples"),
  ]
  assert [(a.rollout.text, a.source) for a in groups[0][2].alternatives] == [
    ("right", "samples"),
    ("a", "siblings"),
  ]
  assert (
    [r.extra_tokens for r in groups[0]] == [10, 0, 0]
    and [r.extra_calls for r in groups[0]] == [3, 0, 0]
    and not groups[1][0].alternatives
  )
  assert (
    metrics["counterfactual/successes"].mean == 0.5
    and metrics["counterfactual/generated_tokens"] == 10.0
  )


class OtherTokenizer(fakes.ByteTokenizer):
  """Every token is the policy's and one more."""

  eos_token_id = 258

  def __call__(self, text, add_special_tokens):
    return {"input_ids": [t + 1 for t in super().__call__(text, add_special_tokens)["input_ids"]]}

  def decode(self, ids, **kwargs):
    return super().decode([t - 1 for t in ids], **kwargs)


def test_a_second_model_answers_in_its_own_tokens_and_is_read_as_text():
  chat, asked = Chat(OtherTokenizer()), []

  class Second(fakes.ScriptedEngine):
    def load(self, params, version):
      self.params = params

    def generate(self, requests):
      prompts = [request.prompt for request in requests]
      asked.append((self.params, prompts, requests[0].sampling.stop_tokens))
      return fakes.ScriptedEngine(
        [[[t + 1 for t in say(text)] for text in ("right", "why")]]
      ).generate(requests)

  groups, answers = (
    [[rollout("a"), rollout("b")], [rollout("right", 1.0)] * 2],
    {"right": Feedback(1.0, "")},
  )
  settings = dict(sources=("samples", "model"), model="second")
  other = Collector(
    fakes.ListEnv(answers),
    chat,
    Second([]),
    max_prompt_tokens=300,
    judge_threads=1,
    judge_timeout_s=5.0,
  )
  metrics, own = explored(groups, [[say("c"), say("b")]], answers, (other, "weights"), **settings)
  other.close()
  # once a question, and the solved one never
  assert (
    asked == [("weights", [[t + 1 for t in groups[0][0].prompt_tokens]], (258,))] and len(own) == 1
  )
  assert [[(a.rollout.text, a.source) for a in r.alternatives] for r in groups[0]] == [
    [("right", "model"), ("c", "samples")]
  ] * 2
  assert (
    [r.extra_tokens for r in groups[0]] == [2 + 2 + 6 + 4, 0]
    and [r.extra_calls for r in groups[0]] == [4, 0]
    and metrics["counterfactual/successes"].mean == 0.5
  )
  row = build.method_row("counterfactual")
  row["counterfactual"].update(settings)
  _, packed = batches(row, groups)
  assert packed.contexts[1][0].solution == "right" and "wrong: c" in packed.contexts[1][0].notes
  (_, further) = packed.batch.readings
  # in the policy's tokens
  assert CHAT.tokenizer.decode(further.rows.token_CPT[0, 0]).count("right") == 1
  for wrong in (dict(model="second"), dict(sources=("model",))):
    with pytest.raises(ValueError, match="method.counterfactual.model="):
      Notes(**wrong)


def test_a_second_model_is_loaded_and_asked_beside_the_policy(monkeypatch, tmp_path):
  """Packaged models of other vocabularies; the loop is replaced by its first line, so that no train
  step is compiled.
  """
  c = config.base()
  c.method, c.mesh.fsdp, c.sandbox.workers = build.method_row("counterfactual"), 1, 1
  c.method.counterfactual.update(sources=("model",), model="tiny_arithmetic", alternatives=1)
  # no program is as short as that
  c.rollout.update(questions=1, group=1, rows=1, max_new_tokens=3, chunk=3)
  seen = []
  monkeypatch.setattr(
    train,
    "run",
    lambda state, host, steps, **_: seen.extend(steps.collect(state, 1)) or state,
  )
  monkeypatch.setattr(train.report, "write_report", lambda *_: None)
  train.train(c, tmp_path)
  ((attempt,),) = seen
  (alternative,) = attempt.alternatives
  second = load_tokenizer(config.MODELS["tiny_arithmetic"])
  assert (
    alternative.source == "model" and alternative.rollout.prompt_tokens != attempt.prompt_tokens
  )
  assert (
    Chat(second).response_text(alternative.rollout.tokens) == alternative.rollout.text
    and attempt.extra_tokens == len(alternative.rollout.tokens) <= 3
  )
  short = tmp_path / "short"
  shutil.copytree(config.MODELS["tiny_arithmetic"], short)
  (short / "config.json").write_text(
    (short / "config.json")
    .read_text()
    .replace('"max_position_embeddings": 1024', '"max_position_embeddings": 258')
  )
  for model, says in (
    ("nowhere", "nowhere: no such directory"),
    (
      str(short),
      "config.data.max_prompt_tokens=256 and config.rollout.max_new_tokens=3 "
      "together exceed the 258 ",
    ),
  ):
    c.method.counterfactual.model = model
    with pytest.raises(
      errors.SettingError, match=f"^config.method.counterfactual.model='{model}': {says}"
    ):
      train.train(c, tmp_path / "refused")


def test_an_alternative_that_could_not_be_judged_is_told_to_nobody_and_counted_once():
  groups = [[rollout("a"), rollout("b"), rollout("c", status=Status.ENV_FAILED)], [rollout("d")]]
  answers = {"broken": fakes.FAILED, "raises": RuntimeError("boom")}
  metrics, _ = explored(
    groups,
    [[say("broken"), say("e")], [say("raises"), say("f")]],
    answers,
    sources=("samples", "siblings"),
  )
  # two attempts share the first, and the sibling
  assert metrics["counterfactual/not_judged"] == 3.0
  assert [[a.rollout.text for a in r.alternatives] for g in groups for r in g] == [
    ["e", "b"],
    ["e", "a"],
    [],
    ["f"],
  ]
  metrics, _ = explored([[rollout("a")]], [[say("e"), say("f")]], {})
  assert metrics["counterfactual/not_judged"] == 0.0


def test_branches_begin_where_the_entropy_is_highest():
  """At the first such token, however likely the one that was sampled."""
  attempt = rollout("abc", logp=[-1.0, -0.1, -5.0, -0.5])
  attempt.entropy = [0.5, 2.0, 1.5, 2.0]
  metrics, asked = explored([[attempt]], [[say("xy"), say("bc")]], {}, sources=("branches",))
  assert asked == [[attempt.prompt_tokens + CHAT.text_tokens("a")]]
  (branch,) = attempt.alternatives  # the other one is the attempt again
  assert (
    branch.rollout.text == "axy"
    and branch.rollout.logp == [-1.0] * 4
    and branch.rollout.entropy is None
    and branch.rollout.feedback.text == "wrong: axy"
  )
  assert attempt.extra_tokens == 6 and metrics["counterfactual/env_calls"] == 2.0


def test_beams_begin_there_too_and_are_searched_for(monkeypatch):
  asked = []

  def search(engine, requests):
    asked.extend((r.prompt, r.n, r.sampling) for r in requests)
    return engine.generate(requests)

  monkeypatch.setattr(fakes.ScriptedEngine, "search", search, raising=False)
  attempt = rollout("abc")
  attempt.entropy = [0.5, 1.0, 1.5, 0.0]
  script, settings = [[say("x"), say("cd")]], dict(sources=("beams",), beam_width=3)
  sampling = dataclasses.replace(SAMPLING, top_p=0.5, entropy=True)
  explored([[attempt]], script, {}, sampling=sampling, **settings)
  prompt = attempt.prompt_tokens + CHAT.text_tokens("ab")
  assert asked == [(prompt, 2, dataclasses.replace(SAMPLING, beams=3))]  # uncut
  assert [(a.rollout.text, a.source) for a in attempt.alternatives] == [
    ("abx", "beams"),
    ("abcd", "beams"),
  ]
  for wrong in (dict(beam_width=5), dict(sources=("beams",), alternatives=5)):
    with pytest.raises(ValueError, match="method.counterfactual.beam_width="):
      Notes(**wrong)


def test_a_run_learns_from_beams(tmp_path):
  command = ["main", f"--config={ROOT}/configs/counterfactual.py:local", f"--workdir={tmp_path}"]
  settings = {"method.counterfactual.sources": "('beams',)", "total_steps": 1, "mesh.fsdp": 1}
  assert main.main(command + [f"--config.{key}={value}" for key, value in settings.items()]) == 0
  lines = (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()
  alternatives = [a for line in lines for a in json.loads(line).get("counterfactuals", ())]
  assert alternatives and all(a["source"] == "beams" for a in alternatives)


def test_imagined_feedback_is_asked_for_once_and_measured_against_the_judge():
  groups = [[rollout("a"), rollout("b")]]
  # first the alternatives, then what the policy thinks of them
  script = [[say("c"), say("d")]], [[say("wrong: c")], [say("Correct")]]

  class InTurn(fakes.ScriptedEngine):
    def generate(self, requests):
      prompts = [request.prompt for request in requests]
      asked.append((prompts, requests[0].sampling.max_new_tokens))
      return fakes.ScriptedEngine(script[len(asked) - 1]).generate(requests)

  asked = []
  collector = Collector(
    fakes.ListEnv({}), CHAT, InTurn([]), max_prompt_tokens=300, judge_threads=2, judge_timeout_s=5.0
  )
  imagining = explorer(collector, feedback="imagined", imagined_tokens=9)
  metrics = imagining.explore(None, groups, sampling=SAMPLING, step=1)
  collector.close()
  ((prompts, longest),) = asked[1:]
  text = CHAT.tokenizer.decode(prompts[0])
  assert (
    longest == 9
    and len(prompts) == 2
    and "Say it.\n\nThis answer\n\na\n\nreceived the verdict\n\nwrong: a" in text
    and "\n\nc\n\nReply with" in text
  )
  assert [[(a.rollout.text, a.imagined) for a in r.alternatives] for r in groups[0]] == [
    [("c", "wrong: c"), ("d", "Correct")]
  ] * 2
  assert (
    metrics["counterfactual/imagined_wrong"].mean
    == 0.5
    == metrics["counterfactual/imagined_verdict_wrong"].mean
  )
  assert (
    metrics["counterfactual/alternatives"].mean == 2.0 and "counterfactual/successes" in metrics
  )
  assert [r.extra_tokens for r in groups[0]] == [2 + 2 + 9 + 8, 0]
  ((context, weight),) = read(groups[0][0], groups[0], feedback="imagined")
  # what the judge says of it reaches no teacher
  assert "wrong: d" not in context.render("Q") and weight == 0.5
  groups = [[rollout("a" * 300)]]
  asked.clear()
  metrics, _ = explored(groups, script[0], {}, feedback="imagined")
  assert metrics["counterfactual/not_imagined"] == 2.0 and not groups[0][0].alternatives


def test_a_control_is_told_the_opposite_of_every_verdict():
  """Of siblings too; and a success that it is told of as a failure is no solution to show."""
  groups = [[rollout("a"), rollout("b"), rollout("right", reward=1.0)]]
  settings = dict(feedback="opposite", sources=("siblings",), kappa=1.0)
  metrics, _ = explored(groups, [], {}, **settings)
  assert [(a.rollout.text, a.imagined) for a in groups[0][0].alternatives] == [
    ("b", "Correct"),
    ("right", "Incorrect"),
  ]
  assert not groups[0][2].alternatives
  assert metrics["counterfactual/imagined_wrong"].mean == 1.0
  silent = FeedbackOrSolution(use_solution=False, feedback="always")
  ((context, weight),) = further_readings(Notes(**settings), silent, groups[0], 0)
  assert weight == 1.0 and not context.solution
  assert "b\ninstead of\na\nyou would have received\nCorrect" in context.notes
  assert "right\ninstead of\na\nyou would have received\nIncorrect" in context.notes


def test_notes_tell_no_more_of_the_hidden_tests_than_feedback_does():
  """TinyCode, its real judge: whatever expected output the teacher reads stands in the feedback
  that an attempt received.
  """
  with Sandbox(workers=1) as sandbox:
    env = TinyCode(sandbox=sandbox)
    for task in (env.task("train", i) for i in range(6)):
      *attempts, success = [
        rollout(text, task=task)
        for text in [program([name]) for name in ("reverse", "sort", "sum", "upper", "twice")]
        + [task.solution]
      ]
      for r in (*attempts, success):
        r.feedback = env.judge(task, r.text)
      attempts = [r for r in attempts if not r.feedback.reward]
      attempt = told(
        attempts[0], *(Alternative(r, "samples") for r in (*attempts[1:], success)), alternatives=9
      )
      assert success.feedback.reward == 1.0 and len(attempt.alternatives) > 1
      ((context, _),) = read(attempt, alternatives=9)
      said = [r.feedback.text for r in attempts]
      assert context.solution == task.solution and context.notes
      for text in re.split("\nIf you had tried\n", context.notes)[1:]:
        assert (
          text.split("\nyou would have received\n")[1] in said and text.count("Expected: ") <= SHOWN
        )
      shown = set(re.findall("Expected: (.*)", context.render(task.prompt)))
      assert shown <= {line for text in said for line in re.findall("Expected: (.*)", text)}
      assert not context.feedback or context.feedback == attempt.feedback.text


@pytest.mark.parametrize(
  "settings, max_new_tokens, says",
  [
    (
      dict(feedback="imagined", imagined_tokens=513),
      24,
      r"config.data.max_teacher_tokens=512 and config.method.counterfactual.imagined_tokens=513 "
      "together exceed the 1024 positions",
    ),
    (
      dict(sources=("siblings", "branches")),
      400,
      r"config.data.max_prompt_tokens=256 and twice config.rollout.max_new_tokens=400, "
      "for config.method.counterfactual.sources=",
    ),
  ],
)
def test_what_alternatives_generate_must_fit_the_model(settings, max_new_tokens, says, tmp_path):
  c = config.base()
  c.method, c.rollout.max_new_tokens, c.mesh.fsdp = (
    build.method_row("counterfactual"),
    max_new_tokens,
    1,
  )
  c.method.counterfactual.update(settings)
  with pytest.raises(errors.SettingError, match=says) as error:
    train.train(c, tmp_path)
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def batches(method, groups):
  """The batch that training would make of the groups under these settings."""
  c = config.base()
  c.method = method
  learn = learner.make_learner(c, fakes.toy_config(layers=1, width=16, heads=2, kv_heads=1))
  packer = fakes.make_packer(
    learn.method,
    CHAT,
    lambda task: [{"role": "user", "content": task.prompt}],
    Shapes((500, 500, 100)),
    max_teacher_tokens=400,
    further_readings=learn.further_readings,
  )
  return learn, packer.pack(groups)


def test_without_weight_or_alternatives_it_is_sdpo_bit_for_bit():
  """Loss, gradient and parameters after five steps; no alternative is asked for."""
  group = [
    told(rollout("a"), verified("b"), verified("c", 1.0)),
    rollout("d"),
    rollout("right", 1.0),
  ]
  rows = [
    build.method_row("sdpo"),
    build.method_row("counterfactual"),
    build.method_row("counterfactual"),
  ]
  rows[1]["counterfactual"]["eta"], rows[2]["counterfactual"]["alternatives"] = 0.0, 0
  _, params = fakes.toy_model(0, layers=1, width=16, heads=2, kv_heads=1)
  ended = []
  for method in rows:
    learn, packed = batches(method, [group])
    packed = fakes.controlled(packed, learn.method)
    assert learn.further_readings is None and len(packed.batch.readings) == 1
    assert learner.make_explorer(config.base(), learn.method, None, seed=0) is None
    state, step, said = (
      init_state(params, learn.tx, keep_teacher=learn.method.teacher_weights.keep),
      jax.jit(learn.step),
      [],
    )
    for _ in range(5):
      state, metrics = step(state, packed.batch)
      # the optimiser's moments after the first step are the gradient and its square, scaled
      said.append((state, metrics["train/loss"]))
    ended.append(said)
  assert ended[0][0][1].mean > 0
  for other in ended[1:]:
    jax.tree.map(np.testing.assert_array_equal, ended[0], other)


def test_the_batch_holds_the_same_responses_under_the_notes():
  group = [
    told(rollout("a"), verified("bb"), verified("ccc")),
    rollout("dd", 0.0, ""),
    rollout("e", 0.0, "no"),
  ]
  row = build.method_row("counterfactual")
  row["counterfactual"].update(eta=0.5)
  learn, packed = batches(row, [group])
  (_, further), (_, contexts) = packed.batch.readings, packed.contexts
  assert further.weight_BR.max(1).tolist() == [0.5, 0, 0] and [c is not None for c in contexts] == [
    True,
    False,
    False,
  ]
  asked = CHAT.prompt_tokens(
    [{"role": "user", "content": contexts[0].render("Say it.")}], teacher=True
  )
  assert (
    "wrong: ccc" in contexts[0].notes
    and further.rows.token_CPT[further.rows.segment_CPT > 0].tolist() == asked + group[0].tokens
  )
  at, n = packed.batch.start_B[0], len(group[0].tokens)
  assert (
    further.rows.token_CPT.reshape(-1)[further.rows.at_CX[0, at : at + n] + 1].tolist()
    == group[0].tokens
  )
  assert packed.metrics["counterfactual/teacher_tokens"] == len(asked) + n and packed.metrics[
    "counterfactual/told_share"
  ] == pytest.approx(1 / 3)
  # nothing to tell: the same program, no weight
  (_, again) = batches(row, [[rollout("a"), rollout("b"), rollout("c")]])[1].batch.readings
  assert not again.weight_BR.max(1).any()
  row["counterfactual"]["form"] = "each"
  assert [r.weight_BR.max(1).tolist() for r in batches(row, [group])[1].batch.readings[1:]] == [
    [0.25, 0, 0]
  ] * 2


@pytest.mark.parametrize(
  "form, gate, pieces", [("joint", False, 1), ("each", True, 2), ("mixture", False, 2)]
)
def test_the_loss_is_the_specifications(form, gate, pieces):
  """sdpo_loss + eta w of it under other prompts, over the tokens of one batch, or with a mixture as
  the teacher; on dense logits, value and gradient.
  """
  setup, params = fakes.toy_model(0, layers=1, width=16, heads=2, kv_heads=1)
  _, teacher = fakes.toy_model(1, layers=1, width=16, heads=2, kv_heads=1)
  batch = fakes.toy_batch(rows=4, packs=pieces)
  # row 2 has no feedback
  one, two = np.array([0.5, 0, 0.25, 0], np.float32), np.array([0.5, 0, 0, 0.125], np.float32)
  backwards = batch.readings[0].rows
  backwards = backwards._replace(token_CPT=backwards.token_CPT[:, :, ::-1] * 1)
  further = [
    Reading(rows, fakes.per_token(weight_B, batch))
    for rows, weight_B in ((batch.policy, one), (backwards, two))
  ]
  readings = (*batch.readings, *further)
  batch = batch._replace(readings=readings)
  row = build.method_row("counterfactual") | dict(
    token_weight=dict(name="uniform"),
    token_signal=dict(name="divergence", alpha=0.5, top_k=7 if form == "mixture" else None),
  )
  row["counterfactual"] = dict(name="notes", gate=gate, form=form)
  method, tx = build.build_method(row), optax.sgd(1.0)
  step = jax.jit(make_train_step(make_signals(setup, method), method, tx))
  state, metrics = step(init_state(params, tx)._replace(teacher=teacher), batch)

  def dense(params, half):
    packs = [jax.tree.map(lambda x: x[c : c + 1], half) for c in range(pieces)]
    rows = [
      batch._replace(
        **{
          n: x[c * 4 // pieces : (c + 1) * 4 // pieces]
          for n, x in batch._asdict().items()
          if n.endswith(("_B", "_BR"))
        }
      )
      for c in range(pieces)
    ]
    return jax.nn.log_softmax(
      jnp.concatenate([fakes.dense_logits(params, setup, p, b) for p, b in zip(packs, rows)])
    )

  said = functools.partial(
    reference.sdpo_loss, is_clip=None, rollout_is_clip=None, top_k=row["token_signal"]["top_k"]
  )
  taught_B = (batch.readings[0].weight_BR.max(1) > 0) | (one > 0) | (two > 0)
  tokens = (batch.weight_BR * taught_B[:, None]).sum()
  pick = lambda logp_BRV: jnp.take_along_axis(logp_BRV, batch.response_BR[..., None], -1)[..., 0]

  def loss(params):
    policy, plain, others = (
      dense(params, batch.policy),
      dense(teacher, batch.readings[0].rows),
      [(r.weight_BR.max(1), dense(teacher, r.rows)) for r in batch.readings[1:]],
    )
    if form == "mixture":
      share = lambda weight_B: (weight_B / (1.0 + one + two))[:, None, None]
      plain = jnp.log(
        share(np.ones(4)) * jnp.exp(plain)
        + sum(share(weight_B) * jnp.exp(other) for weight_B, other in others)
      )
    total = said(
      policy, plain, batch.response_BR, batch.weight_BR, batch.readings[0].weight_BR.max(1)
    )
    for weight_B, other in others if form != "mixture" else ():
      agree_BR = jnp.sign(pick(other) - pick(policy)) == jnp.sign(pick(plain) - pick(policy))
      weight_BR = (
        batch.weight_BR
        * weight_B[:, None]
        * (agree_BR | (batch.readings[0].weight_BR == 0) if gate else 1.0)
      )
      total += (
        said(policy, other, batch.response_BR, weight_BR, np.ones(4))
        * jnp.maximum(weight_BR.sum(), 1.0)
        / tokens
      )
    return total

  want, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert float(metrics["train/loss"].mean) == pytest.approx(float(want), rel=1e-5)
  assert form == "mixture" or 0 <= metrics["counterfactual/agreement"].mean < 1
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))
  jax.tree.map(
    lambda old, new, g: np.testing.assert_allclose(old - new, g, atol=2e-5 * scale),
    params,
    state.params,
    grads,
  )
