"""The pre-training corpora.

What the shipped models have read stays as it was, and hindsight has the very words of training.
"""

import sys
import zlib

import pytest

from sdpo_jax import alternatives
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.corpus import DOMAINS, VIEWS, Corpus, Mixture, build_tokenizer
from sdpo_jax.envs.arithmetic import Arithmetic, chain
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.objectives.notes import CORRECT, Notes, further_readings
from sdpo_jax.objectives.teacher_context import FeedbackOrSolution
from sdpo_jax.records import Rollout, Sampling, Task
from sdpo_jax.rollout import Collector
from sdpo_jax.sandbox import Sandbox
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer())
ROWS = 80


@pytest.fixture(scope="module")
def envs():
  with Sandbox(workers=1) as sandbox:
    yield {"tinycode": TinyCode(sandbox=sandbox), "arithmetic": Arithmetic()}


def only(view, **settings):
  return Mixture(**(dict.fromkeys(VIEWS, 0.0) | {view: 1.0} | settings))


# The interpreter words the errors: of 400 problems of TinyCode one tells of min() of nothing, which
# Python 3.12 and later call otherwise.
PYTHON_3_11 = pytest.mark.skipif(
  sys.version_info[:2] != (3, 11), reason="other Pythons word an error otherwise"
)


@pytest.mark.parametrize(
  "domain, checksum",
  [pytest.param("tinycode", 2934915202, marks=PYTHON_3_11), ("arithmetic", 926289844)],
)
def test_the_corpora_of_the_shipped_models_are_what_they_were(domain, checksum):
  corpus = Corpus(DOMAINS[domain][0])
  assert (
    zlib.crc32("".join(repr(tuple(corpus.problem(0, i))[:2]) for i in range(400)).encode())
    == checksum
  )


class Recorded(Corpus):
  """Remembers the attempts that a row of hindsight tells of."""

  def _attempts(self, *args, **kwargs):
    self.attempts = super()._attempts(*args, **kwargs)
    return self.attempts


def task_of(domain, row, statement):
  data = (
    {"numbers": chain(row.ops, row.details["start"])}
    if domain == "arithmetic"
    else {"tests": DOMAINS[domain][0].answer(row.ops, row.details)[1]["tests"]}
  )
  return Task("t/0", statement, data=data)


def in_training(env, task, attempt, others, *, imagined=()):
  """The failed attempt as training has it after these answers of the engine.

  It is judged and has its alternatives. Returned as well: the messages that the engine was asked.
  """
  asked = []

  class Engine(fakes.ScriptedEngine):
    def generate(self, requests):
      asked.append([CHAT.tokenizer.decode(request.prompt) for request in requests])
      texts = [[text] for text in imagined] if len(asked) > 1 else [list(others)]
      script = [[CHAT.text_tokens(text) + [257] for text in row] for row in texts]
      return fakes.ScriptedEngine(script).generate(requests)

  collector = Collector(
    env, CHAT, Engine([]), max_prompt_tokens=10_000, judge_threads=1, judge_timeout_s=60.0
  )
  tokens = CHAT.text_tokens(attempt) + [257]
  rollout = Rollout(
    task,
    CHAT.prompt_tokens(env.prompt(task)),
    tokens,
    [-1.0] * len(tokens),
    "stop",
    attempt,
    env.judge(task, attempt),
  )
  settings = Notes(alternatives=len(others), feedback="imagined" if imagined else "verified")
  explorer = alternatives.Explorer(
    settings, collector, seed=0, success_threshold=0.5, max_prompt_tokens=10_000
  )
  try:
    sampling = Sampling(10_000, stop_tokens=(257,))
    explorer.explore(None, [[rollout]], sampling=sampling, step=1)
  finally:
    collector.close()
  return settings, rollout, asked


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_row_of_notes_is_what_the_teacher_reads_in_training(domain, envs):
  """The same attempts, judged by the environment, with the notes of the trainer's own code.

  Or with their verdicts imagined, all of them rightly.
  """
  corpus, kinds = Recorded(DOMAINS[domain][0], only("notes")), set()
  for i in range(ROWS):
    row = corpus.problem(0, i)
    attempt, *others = corpus.attempts
    statement = Corpus(DOMAINS[domain][0], only("plain")).problem(0, i).message
    task, texts = task_of(domain, row, statement), [r.text for r in others]
    assert envs[domain].judge(task, row.response).reward == 1.0
    assert DOMAINS[domain][0].solves(row.response, *row[2:5])
    expected = []
    for imagined in ((), [envs[domain].judge(task, text).text or CORRECT for text in texts]):
      settings, rollout, _ = in_training(envs[domain], task, attempt.text, texts, imagined=imagined)
      context, _ = further_readings(settings, FeedbackOrSolution(), [rollout], 0)[0]
      expected.append(context.render(statement))
    assert row.message in expected
    kinds.add((len(others), "Correct solution:" in row.message, CORRECT + "\n" in row.message))
  assert (
    {n for n, _, _ in kinds} == {1, 2}
    and any(solved for _, solved, _ in kinds)
    and any(right for _, _, right in kinds)
  )


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_row_of_imagination_is_what_the_policy_is_asked_in_training(domain, envs):
  corpus, replies = Recorded(DOMAINS[domain][0], only("imagine")), []
  for i in range(ROWS):
    row = corpus.problem(0, i)
    attempt, other = (r.text for r in corpus.attempts)
    task = task_of(domain, row, Corpus(DOMAINS[domain][0], only("plain")).problem(0, i).message)
    _, rollout, asked = in_training(envs[domain], task, attempt, [other], imagined=["?"])
    assert asked[1] == [
      CHAT.tokenizer.decode(CHAT.prompt_tokens([{"role": "user", "content": row.message}]))
    ]
    judged = envs[domain].judge(task, other)
    assert (
      row.response == (CORRECT if judged.reward else judged.text) and rollout.feedback.reward == 0.0
    )
    replies.append(row.response)
  assert CORRECT in replies and len(set(replies)) > 5


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_longest_rows_fit(domain):
  """The longest rows of notes and of verdicts fit.

  They fit the packs of configs/pretrain_tiny.py, the bound of a teacher's prompt, and the model's
  positions.
  """
  from sdpo_jax import config

  c, chat = (
    config.load(f"configs/pretrain_tiny.py:domain={domain},start=tiny"),
    Chat(build_tokenizer(domain)),
  )
  longest = config.load(f"configs/counterfactual.py:domain={domain}").data.max_teacher_tokens
  assert sum(c.corpus[view] for view in VIEWS) == pytest.approx(1.0)
  for view in ("notes", "imagine"):
    corpus = Corpus(DOMAINS[domain][0], only(view))
    rows = [corpus.problem(0, i) for i in range(300)]
    prompts = [len(chat.prompt_tokens([{"role": "user", "content": r.message}])) for r in rows]
    answers = [len(chat.text_tokens(r.response)) + 1 for r in rows]
    assert (
      max(map(sum, zip(prompts, answers))) <= c.batch.length and max(answers) <= c.batch.responses
    )
    assert max(prompts) <= longest
