"""From judged groups to the batch: what the teacher reads, where each token stands, what is dropped."""

import dataclasses
import json

import numpy as np
import pytest

from sdpo_jax.data.batch import pack
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.packing import Dealt, Text
from sdpo_jax.data.shapes import COMPILATION, Shape, Shapes, choose_shape, full_shape
from sdpo_jax.data.teacher_prompt import CUT, shorten, teacher_prompt
from sdpo_jax.objectives import advantage, teacher_context
from sdpo_jax.objectives.teacher_context import (
  CLOSING,
  FEEDBACK,
  SOLUTION,
  Context,
  feedback_or_solution,
)
from sdpo_jax.records import Feedback, Rollout, Status, Task
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())
TASK = Task("t/0", "Write f.", system="Be brief.")


def messages(task):
  return [{"role": "system", "content": task.system}, {"role": "user", "content": task.prompt}]


def rollout(text, reward, feedback="", status=Status.SCORED):
  tokens = CHAT.text_tokens(text) + [257]
  return Rollout(
    TASK,
    CHAT.prompt_tokens(messages(TASK)),
    tokens,
    [-0.5] * len(tokens),
    "stop",
    text,
    Feedback(reward, feedback, status),
  )


GROUP = [
  rollout("wrong", 0.0, "it " + fakes.NASTY),
  rollout("<think>hm</think> right", 1.0),
  rollout("broken", 0.0, "oops", Status.ENV_FAILED),
  rollout("also right", 1.0),
]


def fresh(known=(), owed=0.0, **kwargs):
  return Shapes((4000, 5000, 3000), list(known), owed, **kwargs)


def packed(group=GROUP, max_teacher_tokens=4096, **context):
  return pack(
    [group],
    chat=CHAT,
    messages=messages,
    teacher_context=lambda g, i: feedback_or_solution(g, i, **context),
    advantage=advantage.group_mean,
    max_teacher_tokens=max_teacher_tokens,
    length_multiple=8,
    response_multiple=8,
    shapes=fresh(),
  )


def test_who_is_shown_what():
  shown = [feedback_or_solution(GROUP, i) for i in range(4)]
  # the first success, its thinking removed; no feedback beside it
  assert shown[0] == Context(solution="right")
  assert shown[1] == Context(solution="also right")  # never its own
  assert shown[2] is None  # the judge failed: nothing is known
  assert shown[3] == Context(solution="right")
  assert feedback_or_solution(GROUP, 0, feedback="always") == Context(
    "right", GROUP[0].feedback.text
  )
  assert feedback_or_solution(GROUP, 0, use_solution=False) == Context("", GROUP[0].feedback.text)
  assert feedback_or_solution([GROUP[1]], 0) is None  # a lone success has neither
  assert feedback_or_solution(GROUP, 0, use_solution=False, feedback="never") is None
  with pytest.raises(ValueError, match="choose from"):
    feedback_or_solution(GROUP, 0, feedback="sometimes")


def test_options_of_the_context():
  group = [
    rollout("wrong", 0.0, "no"),
    rollout("a long success", 1.0),
    rollout("short", 0.6),
    rollout("middling", 1.0),
  ]
  assert feedback_or_solution(group, 0, demonstration="shortest").solution == "short"
  picks = {feedback_or_solution(group, i, demonstration="random").solution for i in range(4)}
  assert len(picks) > 1 and all(p in ("a long success", "short", "middling") for p in picks)
  assert feedback_or_solution(group, 0, demonstration="random") == feedback_or_solution(
    group, 0, demonstration="random"
  )
  assert feedback_or_solution(group, 0, success_threshold=0.7).solution == "a long success"
  with_attempt = feedback_or_solution(group, 0, show_attempt=True)
  assert (
    with_attempt.attempt == "wrong" and "Your earlier attempt:\n\nwrong" in with_attempt.render("Q")
  )
  own = feedback_or_solution(
    group, 0, templates={"solution": " SOL[{text}]", "reprompt": "{solution}|{prompt}"}
  )
  assert own.render("Q {text}") == " SOL[a long success]|Q {text}"
  with pytest.raises(ValueError, match="asks for {nothing}"):
    feedback_or_solution(group, 0, templates={"reprompt": "{nothing}"}).render("Q")
  assert teacher_context.reference_solution(group, 0) is None
  solved = dataclasses.replace(
    group[0], task=dataclasses.replace(TASK, solution="<think>x</think>def f")
  )
  assert teacher_context.reference_solution([solved], 0) == Context("def f")
  # the template may have opened the block
  assert [
    teacher_context.without_thinking(t) for t in ("thought</think>\nX", "<think>a</think>X", "X")
  ] == ["X"] * 3


def test_the_teacher_reads_question_solution_feedback_and_closing_in_this_order():
  text = Context("S{0}\\", "F{x}%s").render("Q{prompt}")
  assert text == "Q{prompt}" + SOLUTION + "S{0}\\" + FEEDBACK + "F{x}%s" + CLOSING


def test_the_same_response_stands_under_both_prompts():
  p = packed()
  b = p.batch
  for row, r in enumerate(GROUP):
    if r.feedback.status is not Status.ENV_FAILED:
      assert b.response_BR[row, : len(r.tokens)].tolist() == r.tokens
    for half, there in ((b.student, b.weight_BR[row].any()), (b.teacher, b.distill_B[row])):
      tokens, segments, positions = (x.reshape(-1) for x in half[:3])
      columns = half.at_CX[0, b.start_B[row] : b.start_B[row] + len(r.tokens)]
      if there:
        assert tokens[columns + 1].tolist() == r.tokens  # the column before a token predicts it
        assert (
          len(set(segments[columns])) == 1
          and positions[columns].tolist() == (columns - columns[0] + positions[columns[0]]).tolist()
        )
  assert (
    b.student.token_CPT.shape[2] % 8
    == b.teacher.token_CPT.shape[2] % 8
    == b.response_BR.shape[1] % 8
    == 0
  )
  assert b.weight_BR.sum(1).tolist() == [
    len(GROUP[0].tokens),
    len(GROUP[1].tokens),
    0,
    len(GROUP[3].tokens),
  ]
  assert b.distill_B.tolist() == [1, 1, 0, 1]
  np.testing.assert_allclose(b.advantage_B, [-2 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
  assert (
    p.metrics["data/dropped"] == 1
    and p.metrics["data/teacher_share"] == 0.75
    and p.metrics["data/solution_share"] == 0.75
  )


def test_a_response_without_a_verdict_may_be_the_longest():
  p = packed(
    [
      rollout("right", 1.0),
      rollout("long " * 9, 0.0, "oops", Status.ENV_FAILED),
      rollout("no", 0.0, "wrong"),
      rollout("nope", 0.0),
    ]
  )
  assert p.batch.response_BR.shape == (4, 8) and p.metrics["data/dropped"] == 1
  assert (
    not p.batch.response_BR[1].any()
    and not p.batch.weight_BR[1].any()
    and p.batch.weight_BR.sum(1).tolist() == [6, 0, 3, 5]
  )
  assert not packed(
    [rollout(text, 0.0, "oops", Status.ENV_FAILED) for text in ("a", "long " * 9)]
  ).batch.weight_BR.any()


def heavy_tailed(questions, group, seed, median=60, longest=1000):
  """Rollouts whose response lengths are log-normal, with one of the greatest length."""
  rng = np.random.default_rng(seed)
  lengths = np.minimum(
    np.exp(rng.normal(np.log(median), 1.2, (questions, group))).astype(int) + 1, longest
  )
  lengths.flat[rng.integers(lengths.size)] = longest
  prompt = CHAT.prompt_tokens(messages(TASK))
  return [
    [
      Rollout(TASK, prompt, [1] * n, [-0.5] * n, "length", "x", Feedback(float(i == 0), "no"))
      for i, n in enumerate(row)
    ]
    for row in lengths
  ]


def pack_many(groups, shapes, **kwargs):
  return pack(
    groups,
    chat=CHAT,
    messages=messages,
    teacher_context=feedback_or_solution,
    advantage=advantage.group_mean,
    max_teacher_tokens=512,
    length_multiple=32,
    response_multiple=8,
    shapes=shapes,
    **kwargs,
  )


@pytest.mark.parametrize(
  "shards, micro_batches, share",
  [(1, 1, False), (4, 1, False), (8, 32, False), (16, 16, False), (1, 32, True), (4, 32, True)],
)
def test_heavy_tailed_lengths_waste_little_and_compile_seldom(shards, micro_batches, share):
  """32 x 8 responses, median 60 and maximum 1000 tokens: the share of columns that hold text, on average over 20 batches. Many micro-batches are for
  answers of 8,192 tokens, one a pack; of these short ones many lie together."""
  shapes, useful = Shapes((10_240, 18_432, 8192)), []
  for seed in range(20):
    p = pack_many(
      heavy_tailed(32, 8, seed),
      shapes,
      shards=shards,
      micro_batches=micro_batches,
      share_prefixes=share,
    )
    useful.append(p.metrics["data/useful_tokens"])
    assert p.batch.student.at_CX.shape[0] == shards  # one micro-batch is enough
  assert np.mean(useful) >= (0.87 if share and shards > 1 else 0.9) and len(shapes.known) <= 6, (
    np.mean(useful),
    shapes,
  )


@pytest.mark.parametrize(
  "longest, packs", [((1100, 1600, 1000), 32), ((2200, 3200, 2000), 4), ((4400, 6400, 4000), 2)]
)
def test_no_pack_takes_more_than_one_of_the_longest_texts(longest, packs):
  """What a plan found to fit stays the bound: the longer answers may be, the more of ordinary ones go into a micro-batch."""
  shapes = Shapes(longest)
  got = pack_many(heavy_tailed(8, 4, 0), shapes, micro_batches=32).batch
  (shape,) = shapes.known
  assert shape.packs == got.student.at_CX.shape[0] == packs
  for half, (rows, length), most in zip((got.student, got.teacher), shape.halves(), longest):
    assert half.token_CPT.shape == (packs, rows, length) and rows * length <= -(-most // 32) * 32
  assert shape.tokens <= longest[2]


def test_rows_are_longer_than_a_text_where_the_longest_texts_would_have_as_many_pairs_of_columns():
  """One text of 1,500 tokens and 63 of 1,000: rows of 3,000 leave no gaps, but attention compares more columns than in 64 rows of 1,500."""
  texts = [[Text(1500)] + [Text(1000)] * 63]
  chosen = lambda longest: choose_shape(
    lambda packs: Dealt(texts, texts, [[100] * 64]),
    [1],
    Shapes((longest, longest, 100)),
    length_multiple=100,
    response_multiple=8,
  )
  few, many = chosen(1500), chosen(3000)
  assert few.rows * few.length**2 <= 64 * 1500**2 < many.rows * many.length**2
  assert many.rows * many.length < few.rows * few.length


def test_few_packs_hold_what_many_held():
  """The same responses with the same numbers, whether each has a pack of its own or all lie in two."""
  groups, seen = heavy_tailed(8, 4, 0), []
  for longest in ((1100, 1600, 1000), (10_240, 18_432, 8192)):
    p = pack_many(groups, Shapes(longest), micro_batches=16, shards=2)
    C, B = p.batch.student.at_CX.shape[0], len(p.rollouts)
    ids = [id(r) for g in groups for r in g]
    rows = {}
    for b, r in enumerate(p.rollouts):
      columns = p.batch.student.at_CX[
        b // (B // C), p.batch.start_B[b] : p.batch.start_B[b] + len(r.tokens)
      ]
      tokens = p.batch.student.token_CPT[b // (B // C)].reshape(-1)[columns + 1].tolist()
      rows[ids.index(id(r))] = (
        tokens,
        float(p.batch.advantage_B[b]),
        float(p.batch.distill_B[b]),
        p.batch.weight_BR[b].sum(),
      )
    seen.append((C, rows))
  assert [C for C, _ in seen] == [32, 2] and seen[0][1] == seen[1][1] and len(seen[0][1]) == 32


def test_packs_hold_whole_questions_and_about_as_much():
  # what a question's responses share is more than what they differ by
  groups = heavy_tailed(8, 4, 0, longest=40)
  groups = [
    [dataclasses.replace(r, task=dataclasses.replace(TASK, id=str(q))) for r in group]
    for q, group in enumerate(groups)
  ]
  p = pack_many(groups, fresh(), updates=2, shards=2, share_prefixes=True)
  for u in range(2):  # an update trains on its own questions, in some order
    assert {r.task.id for r in p.rollouts[16 * u : 16 * (u + 1)]} == {
      str(q) for q in range(4 * u, 4 * (u + 1))
    }
  for c in range(4):
    mine = p.rollouts[8 * c : 8 * (c + 1)]
    assert len({r.task.id for r in mine}) == 2
    for r, start in zip(mine, p.batch.start_B[8 * c : 8 * (c + 1)]):
      columns = p.batch.student.at_CX[c, start : start + len(r.tokens)]
      assert (p.batch.student.token_CPT[c].reshape(-1)[columns + 1] == r.tokens).all()
  one = pack_many(groups, fresh())
  # a single pack keeps the order
  assert [r.task.id for r in one.rollouts] == [str(q) for q in range(8) for _ in range(4)]


def test_a_shape_is_used_again_and_a_length_never_seen_gets_room():
  shapes = fresh(limit=3)
  pack_many(heavy_tailed(8, 4, 0), shapes)
  first = list(shapes.known)
  pack_many(heavy_tailed(8, 4, 0), shapes)
  assert shapes.known == first
  for longest in (200, 400):
    pack_many(heavy_tailed(16, 4, 0, longest=longest), shapes)
  assert len(shapes.known) == 3
  pack_many(heavy_tailed(8, 4, 3, longest=3000), shapes)
  assert len(shapes.known) == 4 and shapes.known[-1] == full_shape(
    32, 1, shapes.longest, length_multiple=32, response_multiple=8, taught=True, more=False
  )
  pack_many(heavy_tailed(8, 4, 4, longest=2900), shapes)
  assert len(shapes.known) == 4


def one_row(tokens, shapes, multiple=8):
  return choose_shape(
    lambda packs: Dealt([[Text(tokens)]], [[Text(1)]], [[8]]),
    [1],
    shapes,
    length_multiple=multiple,
    response_multiple=8,
  )


def test_shapes_of_another_number_of_devices_are_not_used():
  """A run that goes on with more or fewer of them packs for those that it has, and stops looking at what was compiled for others."""
  shapes, batch = fresh(limit=1), heavy_tailed(8, 4, 0)
  packs = [
    pack_many(batch, shapes, shards=shards).batch.student.at_CX.shape[0] for shards in (4, 8, 2, 4)
  ]
  assert packs == [4, 8, 2, 4] and len(shapes.known) == 3


def test_lengths_that_are_all_equal_get_no_room():
  shapes = fresh()
  assert {one_row(800, shapes) for _ in range(50)} == set(shapes.known) and shapes.known[
    0
  ].length == 800


def test_a_better_shape_is_compiled_once_its_lack_has_cost_as_much():
  """Lengths fall to a half: the long shape serves until its waste, in steps, is what a compilation costs, and no longer."""
  shapes = fresh()
  long = one_row(800, shapes)
  served = [one_row(400, shapes) for _ in range(30)]
  # room to grow into
  assert len(shapes.known) == 2 and 400 < (better := shapes.known[1]).length < 450
  assert (
    served.index(better) == -(-COMPILATION // (long.cost() / better.cost() - 1.0)) - 1
    and not shapes.owed
  )


@pytest.mark.parametrize(
  "multiple, first, then", [(8, 800, 760), (1024, 3000, 2000), (32, 160, 120)]
)
def test_a_waste_that_no_better_shape_would_spare_compiles_nothing(multiple, first, then):
  """Nor one that rounding and room would leave as it is."""
  shapes = fresh()
  one_row(first, shapes, multiple)
  assert len({one_row(then, shapes, multiple) for _ in range(400)}) == len(shapes.known) == 1


def test_once_full_only_what_does_not_fit_compiles():
  shapes = fresh(limit=1)
  one_row(800, shapes)
  assert len({one_row(100, shapes) for _ in range(400)}) == len(shapes.known) == 1
  assert one_row(900, shapes).length >= 900 and len(shapes.known) == 2


def test_there_is_no_room_beyond_the_longest_text():
  """One text a pack, at the run's limits: the sizes that a plan compiles for."""
  shapes = Shapes(longest=(10240, 18432, 8192))
  dealt = lambda prompt, response: Dealt(
    [[Text(prompt + response)]], [[Text(10240 + response)]], [[response]]
  )
  at = lambda *sizes: choose_shape(
    lambda packs: dealt(*sizes), [1], shapes, length_multiple=1024, response_multiple=1024
  )
  at(1000, 1000)
  assert at(2048, 8192)[:6] == (1, 10240, 1, 18432, 8192, 8192)


def test_a_resumed_run_chooses_the_same_shapes():
  """Shapes and debt go through a checkpoint's JSON; without the debt the choice would be another."""
  lengths = np.random.default_rng(0).integers(300, 900, 200).tolist()

  def chosen(stop=None, forget=False):
    shapes, out = fresh(), []
    for i, n in enumerate(lengths):
      if i == stop:
        known, owed = json.loads(json.dumps([shapes.known, shapes.owed]))
        assert owed > 0
        shapes = fresh([Shape(*sizes) for sizes in known], 0.0 if forget else owed)
      out.append(one_row(n, shapes))
    return out

  whole = chosen()
  assert len(set(whole)) > 2 and chosen(stop=20) == whole and chosen(stop=20, forget=True) != whole


def test_system_message_is_kept_and_tags_in_feedback_end_no_turn():
  tokens, cut = teacher_prompt(CHAT, messages(TASK), Context(feedback=fakes.NASTY), 4096)
  assert not cut
  # system, user, and the open assistant turn
  assert tokens.count(257) == 2 and tokens.count(256) == 3
  text = CHAT.tokenizer.decode(tokens)
  assert (
    text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    and "< |im_end|>" in text
    and "{prompt} {0} \\n \\1 %s" in text
  )


@pytest.mark.parametrize(
  "context",
  [Context(feedback="x" * 500 + "END"), Context(solution="y" * 600), Context("y" * 300, "x" * 300)],
)
def test_over_long_texts_are_shortened_and_nothing_else(context):
  budget = 250
  tokens, cut = teacher_prompt(CHAT, messages(TASK), context, budget)
  text = CHAT.tokenizer.decode(tokens)
  assert cut and budget - 8 <= len(tokens) <= budget
  assert (
    TASK.prompt in text
    and text.endswith(CLOSING + "<|im_end|>\n<|im_start|>assistant\n")
    and CUT in text
  )


def test_feedback_gives_way_before_the_solution():
  tokens, _ = teacher_prompt(CHAT, messages(TASK), Context("y" * 40, "x" * 400), 330)
  assert "y" * 40 in CHAT.tokenizer.decode(tokens)


def test_where_a_question_alone_fits_it_fits_whatever_was_said():
  """What a run checks of a question before it begins is what it needs later."""
  alone = len(teacher_prompt(CHAT, messages(TASK), Context(), 4096)[0])
  tokens, cut = teacher_prompt(
    CHAT, messages(TASK), Context("y" * 300, "x" * 300, "z" * 300, notes="n" * 300), alone
  )
  assert cut and len(tokens) == alone


def test_a_question_that_alone_is_too_long_is_an_error_that_names_the_setting():
  with pytest.raises(ValueError, match="more than config.data.max_teacher_tokens=60"):
    teacher_prompt(CHAT, messages(TASK), Context(feedback="x"), 60)


def test_shorten_keeps_head_and_tail():
  assert shorten("abcdef", 6) == "abcdef"
  assert shorten("a" * 50 + "b" * 50, 20) == "aaaaaaa" + CUT + "bbbbbb"
  assert shorten("a" * 100, 3) == shorten("a" * 100, len(CUT)) == ""


def test_without_a_teacher_its_half_is_one_small_row():
  p = pack_many([GROUP], fresh())
  assert p.batch.teacher.segment_CPT.any()
  p = pack(
    [GROUP],
    chat=CHAT,
    messages=messages,
    teacher_context=teacher_context.none,
    advantage=advantage.group_mean,
    max_teacher_tokens=64,
    length_multiple=8,
    response_multiple=8,
    shapes=fresh(),
  )
  assert (
    p.batch.teacher.token_CPT.shape == (1, 1, 8)
    and not p.batch.distill_B.any()
    and not p.batch.teacher.segment_CPT.any()
  )


def test_a_question_stands_once_a_row_for_all_its_responses():
  """What a token sees, its prefix and its own segment up to it, is the prompt and the response as they were; positions count through."""
  groups = heavy_tailed(4, 4, 0, longest=120)
  apart, shared = (
    pack_many(groups, fresh(), shards=2, share_prefixes=share) for share in (False, True)
  )
  assert apart.batch.student.prefix_CPT is None
  for half, whole in zip(
    (shared.batch.student, shared.batch.teacher), (apart.batch.student, apart.batch.teacher)
  ):
    assert (half.segment_CPT > 0).sum() < (whole.segment_CPT > 0).sum()
  rows = shared.batch.student
  for b, r in enumerate(shared.rollouts):
    pack_of, T = b // 8, rows.token_CPT.shape[2]
    # of the column that predicts the last token
    p, column = divmod(rows.at_CX[pack_of, shared.batch.start_B[b] + len(r.tokens) - 1], T)
    own, prefix = rows.segment_CPT[pack_of, p, column], rows.prefix_CPT[pack_of, p, column]
    seen = [t for t in range(column + 1) if rows.segment_CPT[pack_of, p, t] in (own, prefix)]
    assert rows.token_CPT[pack_of, p, seen].tolist() == (r.prompt_tokens + r.tokens)[:-1]
    assert rows.position_CPT[pack_of, p, seen].tolist() == list(range(len(seen)))
