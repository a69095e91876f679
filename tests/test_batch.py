"""From groups of rollouts to one batch of packed rows."""

import dataclasses

import jax
import numpy as np
import pytest

from sdpo_jax.data.chat import Chat
from sdpo_jax.data.shapes import Shapes, full_shape
from sdpo_jax.data.teacher_prompt import TeacherReader
from sdpo_jax.objectives import build
from sdpo_jax.records import Completion, Feedback, Rollout, Segment, Status, Task
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


def packer(shapes, context=None, **settings):
  method = build.build_method(
    build.method_row("sdpo_blend")
    | dict(teacher_context=context or dict(name="feedback_or_solution"))
  )
  return fakes.make_packer(method, CHAT, messages, shapes, **settings)


def packed(group=GROUP):
  return packer(fresh(), max_teacher_tokens=4096).pack([group])


def test_the_same_response_stands_under_both_prompts():
  p = packed()
  b = p.batch
  for row, r in enumerate(GROUP):
    if r.feedback.status is not Status.ENV_FAILED:
      assert b.response_BR[row, : len(r.tokens)].tolist() == r.tokens
    for half, there in (
      (b.policy, b.weight_BR[row].any()),
      (b.readings[0].rows, b.readings[0].weight_BR.max(1)[row]),
    ):
      tokens, segments, positions = (x.reshape(-1) for x in half[:3])
      columns = half.at_CX[0, b.start_B[row] : b.start_B[row] + len(r.tokens)]
      if there:
        assert tokens[columns + 1].tolist() == r.tokens  # the column before a token predicts it
        assert (
          len(set(segments[columns])) == 1
          and positions[columns].tolist() == (columns - columns[0] + positions[columns[0]]).tolist()
        )
  assert (
    b.policy.token_CPT.shape[2] % 8
    == b.readings[0].rows.token_CPT.shape[2] % 8
    == b.response_BR.shape[1] % 8
    == 0
  )
  assert b.weight_BR.sum(1).tolist() == [
    len(GROUP[0].tokens),
    len(GROUP[1].tokens),
    0,
    len(GROUP[3].tokens),
  ]
  assert b.readings[0].weight_BR.max(1).tolist() == [1, 1, 0, 1]
  np.testing.assert_allclose(b.advantage_BR[:, 0], [-2 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
  assert (
    p.metrics["data/dropped"] == 1
    and p.metrics["data/teacher_share"] == 0.75
    and p.metrics["data/solution_share"] == 0.75
  )


def test_a_group_that_was_prepared_is_packed_as_it_would_have_been(monkeypatch):
  """Nothing is rendered twice, and what another batch prepared is forgotten."""
  expected = packed()
  p = packer(fresh(), max_teacher_tokens=4096)
  rendered = []
  render = TeacherReader.of_group
  monkeypatch.setattr(
    TeacherReader, "of_group", lambda self, *a: rendered.append(a) or render(self, *a)
  )
  p.prepare(GROUP)
  p.prepare([dataclasses.replace(r) for r in GROUP])
  found = p.pack([GROUP])
  assert len(rendered) == 2
  for a, b in zip(jax.tree.leaves(found.batch), jax.tree.leaves(expected.batch), strict=True):
    np.testing.assert_array_equal(a, b)
  assert found.contexts == expected.contexts
  p.pack([GROUP])
  assert len(rendered) == 3


def test_what_nobody_sampled_stands_in_the_text_and_takes_no_place_in_the_response():
  first, second = GROUP[0].tokens, [65, 66, 257]
  between = (257, 10, 97)
  turns = [
    Segment(0, Completion("q", 0, first, GROUP[0].logp, "length")),
    Segment(len(first), Completion("q", 0, second, [-1.0] * 3, "stop"), between),
  ]
  logp = GROUP[0].logp + [-1.0] * 3
  talk = dataclasses.replace(GROUP[0], tokens=first + second, logp=logp, sampled=turns)
  p = packed([GROUP[1], talk])
  b = [r.tokens for r in p.rollouts].index(talk.tokens)
  count = len(talk.tokens)
  assert p.batch.response_BR[b, :count].tolist() == talk.tokens
  assert p.batch.weight_BR[b].sum() == count
  for rows in (p.batch.policy, p.batch.readings[0].rows):
    begin = p.batch.start_B[b]
    at_X = rows.at_CX[0, begin : begin + count]
    row_T = rows.token_CPT[0].reshape(-1)
    assert row_T[at_X + 1].tolist() == talk.tokens
    assert np.diff(at_X).tolist() == [1] * (len(first) - 1) + [1 + len(between), 1, 1]
    gap = at_X[len(first) - 1] + 2
    assert tuple(row_T[gap : gap + len(between)]) == between


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


def pack_many(groups, shapes, **settings):
  return packer(shapes, max_teacher_tokens=512, length_multiple=32, **settings).pack(groups)


@pytest.mark.parametrize(
  "shards, micro_batches, share",
  [(1, 1, False), (4, 1, False), (8, 32, False), (16, 16, False), (1, 32, True), (4, 32, True)],
)
def test_heavy_tailed_lengths_waste_little_and_compile_seldom(shards, micro_batches, share):
  """32 x 8 responses, median 60 and maximum 1000 tokens: the share of columns that hold text, on
  average over 20 batches. Many micro-batches are for answers of 8,192 tokens, one a pack; of these
  short ones many lie together."""
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
    assert p.batch.policy.at_CX.shape[0] == shards  # one micro-batch is enough
  assert np.mean(useful) >= (0.87 if share and shards > 1 else 0.9) and len(shapes.known) <= 6, (
    np.mean(useful),
    shapes,
  )


@pytest.mark.parametrize(
  "longest, packs", [((1100, 1600, 1000), 32), ((2200, 3200, 2000), 4), ((4400, 6400, 4000), 2)]
)
def test_no_pack_takes_more_than_one_of_the_longest_texts(longest, packs):
  """What a plan found to fit stays the bound: the longer answers may be, the more of ordinary ones
  go into a micro-batch.
  """
  shapes = Shapes(longest)
  got = pack_many(heavy_tailed(8, 4, 0), shapes, micro_batches=32).batch
  (shape,) = shapes.known
  assert shape.packs == got.policy.at_CX.shape[0] == packs
  for half, (rows, length), most in zip(
    (got.policy, got.readings[0].rows), shape.row_sizes(), longest
  ):
    assert half.token_CPT.shape == (packs, rows, length) and rows * length <= -(-most // 32) * 32
  assert shape.tokens <= longest[2]


def test_few_packs_hold_what_many_held():
  """The same responses with the same numbers, whether each has its own pack or all lie in two."""
  groups, seen = heavy_tailed(8, 4, 0), []
  for longest in ((1100, 1600, 1000), (10_240, 18_432, 8192)):
    p = pack_many(groups, Shapes(longest), micro_batches=16, shards=2)
    C, B = p.batch.policy.at_CX.shape[0], len(p.rollouts)
    ids = [id(r) for g in groups for r in g]
    rows = {}
    for b, r in enumerate(p.rollouts):
      pack, first = b // (B // C), p.batch.start_B[b]
      columns = p.batch.policy.at_CX[pack, first : first + len(r.tokens)]
      tokens = p.batch.policy.token_CPT[pack].reshape(-1)[columns + 1].tolist()
      rows[ids.index(id(r))] = (
        tokens,
        float(p.batch.advantage_BR[:, 0][b]),
        float(p.batch.readings[0].weight_BR.max(1)[b]),
        p.batch.weight_BR[b].sum(),
      )
    seen.append((C, rows))
  assert [C for C, _ in seen] == [32, 2]
  assert seen[0][1] == seen[1][1]
  assert len(seen[0][1]) == 32


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
    pack = p.rollouts[8 * c : 8 * (c + 1)]
    assert len({r.task.id for r in pack}) == 2
    for r, start in zip(pack, p.batch.start_B[8 * c : 8 * (c + 1)]):
      columns = p.batch.policy.at_CX[c, start : start + len(r.tokens)]
      assert (p.batch.policy.token_CPT[c].reshape(-1)[columns + 1] == r.tokens).all()
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
    32, 1, shapes.longest, fakes.shape_rules(32), has_teacher=True, has_further=False
  )
  pack_many(heavy_tailed(8, 4, 4, longest=2900), shapes)
  assert len(shapes.known) == 4


def test_shapes_of_another_number_of_devices_are_not_used():
  """A run that goes on with more or fewer of them packs for those that it has, and stops looking at
  what was compiled for others.
  """
  shapes, batch = fresh(limit=1), heavy_tailed(8, 4, 0)
  packs = [
    pack_many(batch, shapes, shards=shards).batch.policy.at_CX.shape[0] for shards in (4, 8, 2, 4)
  ]
  assert packs == [4, 8, 2, 4] and len(shapes.known) == 3


def test_without_a_teacher_its_half_is_one_small_row():
  p = pack_many([GROUP], fresh())
  assert p.batch.readings[0].rows.segment_CPT.any()
  grpo = build.build_method(build.method_row("grpo"))
  p = fakes.make_packer(grpo, CHAT, messages, fresh(), max_teacher_tokens=64).pack([GROUP])
  assert (
    p.batch.readings[0].rows.token_CPT.shape == (1, 1, 8)
    and not p.batch.readings[0].weight_BR.max(1).any()
    and not p.batch.readings[0].rows.segment_CPT.any()
  )


def test_a_question_stands_once_a_row_for_all_its_responses():
  """What a token sees, its prefix and its own segment up to it, is the prompt and the response as
  they were; positions count through.
  """
  groups = heavy_tailed(4, 4, 0, longest=120)
  apart, shared = (
    pack_many(groups, fresh(), shards=2, share_prefixes=share) for share in (False, True)
  )
  assert apart.batch.policy.prefix_CPT is None
  for half, whole in zip(
    (shared.batch.policy, shared.batch.readings[0].rows),
    (apart.batch.policy, apart.batch.readings[0].rows),
  ):
    assert (half.segment_CPT > 0).sum() < (whole.segment_CPT > 0).sum()
  rows = shared.batch.policy
  for b, r in enumerate(shared.rollouts):
    pack_of, T = b // 8, rows.token_CPT.shape[2]
    # of the column that predicts the last token
    p, column = divmod(rows.at_CX[pack_of, shared.batch.start_B[b] + len(r.tokens) - 1], T)
    own, prefix = rows.segment_CPT[pack_of, p, column], rows.prefix_CPT[pack_of, p, column]
    seen = [t for t in range(column + 1) if rows.segment_CPT[pack_of, p, t] in (own, prefix)]
    assert rows.token_CPT[pack_of, p, seen].tolist() == (r.prompt_tokens + r.tokens)[:-1]
    assert rows.position_CPT[pack_of, p, seen].tolist() == list(range(len(seen)))
