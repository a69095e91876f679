"""The gate between engine and trainer: a batch that trains what was not sampled is refused."""

import dataclasses

import numpy as np
import pytest

from sdpo_jax.data import batch as batches
from sdpo_jax.data.sampled import check_sampled
from sdpo_jax.errors import RunError
from sdpo_jax.records import Completion, Segment
from tests.test_batch import GROUP, fresh, packer, rollout


def conversation(text):
  """A rollout of two turns with three tokens of glue between them."""
  r = rollout(text, 1.0)
  count = len(r.tokens)
  first = Completion("q", 0, list(r.tokens), list(r.logp), "stop")
  second = Completion("q", 0, [7, 8], [-1.5, -2.5], "length")
  return dataclasses.replace(
    r,
    tokens=r.tokens + [7, 8],
    logp=r.logp + second.logp,
    sampled=[Segment(0, first), Segment(count, second, (1, 2, 3))],
  )


def packed(**settings):
  group = [GROUP[0], conversation("yes"), GROUP[2], GROUP[3]]
  return packer(fresh(), max_teacher_tokens=4096, **settings).pack([group])


@pytest.mark.parametrize("settings", [{}, dict(micro_batches=2), dict(share_prefixes=True)])
def test_a_batch_of_what_was_sampled_passes(settings):
  p = packed(**settings)
  assert sorted(r.sampled is None for r in p.rollouts) == [False, True, True, True]
  check_sampled(p.batch, p.rollouts)


def altered(array, *index):
  array = np.array(array)
  array[index] += 1
  return array


def spoilt(what, batch, b):
  """The batch with one thing wrong in row b, whose second turn begins at token 4."""
  if what == "id":
    return batch._replace(response_BR=altered(batch.response_BR, b, 2))
  if what == "log-probability":
    return batch._replace(logp_rollout_BR=altered(batch.logp_rollout_BR, b, 2))
  if what == "shifted":
    logp_BR = batch.logp_rollout_BR.copy()
    logp_BR[b] = np.roll(logp_BR[b], 1)
    return batch._replace(logp_rollout_BR=logp_BR)
  if what == "start":
    return batch._replace(start_B=altered(batch.start_B, b))
  rows = batch.policy if what == "policy" else batch.readings[0].rows
  column = rows.at_CX[0, batch.start_B[b] + 5] + 1  # a token of the second turn
  P, T = divmod(int(column), rows.token_CPT.shape[2])
  rows = rows._replace(token_CPT=altered(rows.token_CPT, 0, P, T))
  if what == "policy":
    return batch._replace(policy=rows)
  return batch._replace(readings=(batch.readings[0]._replace(rows=rows),))


SPOILT = {  # what is wrong: what the error says of it
  "id": "trains another token than the engine returned, first at token 2",
  "log-probability": "trains another log-probability than the engine returned, first at token 2",
  "shifted": "trains another log-probability than the engine returned, first at token 0",
  "start": "holds other tokens in the policy's row than the response has, first at token 0",
  "policy": "holds other tokens in the policy's row than the response has, first at token 5",
  "teacher": "holds other tokens in the teacher's row of reading 0 than .*, first at token 5",
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_not_sampled_is_named(what):
  p = packed()
  b = next(i for i, r in enumerate(p.rollouts) if r.sampled)
  with pytest.raises(RunError, match=rf"row {b} of the batch \(task t/0\) {SPOILT[what]}: a mist"):
    check_sampled(spoilt(what, p.batch, b), p.rollouts)


def test_a_row_that_trains_nothing_is_not_asked():
  p = packed()
  b = next(i for i, r in enumerate(p.rollouts) if not p.batch.weight_BR[i].any())
  check_sampled(spoilt("id", p.batch, b), p.rollouts)


def test_the_packer_asks_in_every_batch(monkeypatch):
  """Ids that somebody changes between engine and batch, such as by encoding a text anew."""
  changed = conversation("yes")
  changed.tokens[0] += 1
  group = [GROUP[0], changed, GROUP[2], GROUP[3]]
  with pytest.raises(
    RunError, match="trains another token than the engine returned, first at .* 0"
  ):
    packer(fresh(), max_teacher_tokens=4096).pack([group])
  monkeypatch.setattr(batches, "check_sampled", lambda *_: None)  # nothing else sees it
  packer(fresh(), max_teacher_tokens=4096).pack([group])
