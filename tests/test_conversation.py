"""Conversations of ids: what is fed is what is trained, on the templates of all families."""

import dataclasses

import jax
import numpy as np
import pytest

from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.conversation import Continuation, Conversation
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.engine.requests import RequestQueue
from sdpo_jax.errors import SettingError
from sdpo_jax.objectives import build
from sdpo_jax.records import Completion, Feedback, Request, Rollout, Sampling, Task
from sdpo_jax.train_step import make_signals
from tests import families
from tests.fakes import make_packer
from tests.test_batch import fresh
from tests.test_decoder import LLAMA, OLMO, QWEN, params_of

QWEN25 = dataclasses.replace(QWEN, qk_norm="none", qkv_bias=True)
MODEL_OF = {"qwen2.5": QWEN25, "qwen3": QWEN, "llama3": LLAMA, "olmo3": OLMO, "olmo3 think": OLMO}
THINKS = {"qwen3": (False, True)}  # elsewhere the template knows no switch
CASES = [(name, on) for name in families.FAMILIES for on in THINKS.get(name, (False,))]
SPACED, THOUGHT = repr(" \nFour. \n"), repr("<think>\nhm\n</think>\n\n")
EMPTY = repr("<think>\n\n</think>\n\n")
FINDINGS = {  # way, what the reason holds
  ("qwen2.5", False): ("exact", ""),
  ("qwen3", False): ("kept", f"leaves {EMPTY} out of earlier turns"),
  ("qwen3", True): ("kept", f"leaves {THOUGHT} out of earlier turns"),
  ("llama3", False): ("kept", f"writes 'Four.' for {SPACED} in earlier turns"),
  ("olmo3", False): ("exact", ""),
  ("olmo3 think", False): ("exact", ""),
}
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def chat_of(name, thinking=False, template=None, merges=()):
  tokenizer = families.tokenizer(name, template, merges)
  ends = (families.end_of_turn(name, tokenizer),)
  return Chat(tokenizer, thinking=thinking, eos_ids=ends)


@pytest.mark.quick
@pytest.mark.parametrize("name, thinking", CASES)
def test_what_each_family_does_with_earlier_turns(name, thinking):
  continuation = Continuation(chat_of(name, thinking, merges=(("Ċ", "Ċ"), ("e", "r"))))
  way, reason = FINDINGS[name, thinking]
  assert continuation.finding.way == way and reason in continuation.finding.reason
  assert continuation.glue.strips == (name == "llama3")
  assert way == "exact" or continuation.finding.reason in continuation.describe()


@pytest.mark.quick
def test_the_models_of_the_package_are_exact():
  for name in ("tiny", "tiny_notes", "tiny_arithmetic", "tiny_household"):
    assert Continuation(Chat(load_tokenizer(MODELS[name]))).finding == ("exact", "")


def say(conversation, tokens):
  conversation.add_response(Completion("q", 0, tokens, [-1.0] * len(tokens), "stop"))


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "olmo3"])
def test_the_text_is_the_templates_own(name):
  """Text for text and id for id, whether a response has its stop token or was cut off."""
  chat = chat_of(name)
  end = families.end_of_turn(name, chat.tokenizer)
  messages, conversation = list(QUESTION), Conversation(Continuation(chat), QUESTION)
  for response, stop, message in (
    ("Four.", [end], "Why? "),
    ("I count", [], "<|im_end|><|eot_id|> {{ x }}\n\n"),
    ("", [end], ""),
  ):
    say(conversation, chat.text_tokens(response) + stop)
    conversation.add_message(message)
    messages.append({"role": "assistant", "content": response})
    messages.append({"role": "user", "content": message})
    assert conversation.prompt == chat.prompt_tokens(messages)
  assert conversation.rendered_again == 0


@pytest.mark.quick
def test_ids_stay_though_their_text_would_be_encoded_otherwise():
  """Two ids for a text that the tokenizer writes with one, and another stop token."""
  chat = chat_of("qwen2.5", merges=(("e", "r"),))
  conversation = Conversation(Continuation(chat), QUESTION)
  e, r, er = chat.tokenizer.convert_tokens_to_ids(["e", "r", "er"])
  end, text_end = chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
  assert chat.text_tokens("er") == [er]
  begun = conversation.prompt
  say(conversation, [e, r, text_end])
  conversation.add_message("er")
  told = conversation.prompt[len(begun) :]
  assert told[:4] == [e, r, text_end, end] and er in told[4:]


THOUGHTFUL = "<think>\n4\n</think>\n\nFour."


@pytest.mark.quick
def test_the_history_of_a_thinking_model_extends_the_prompt():
  chat = chat_of("qwen3", thinking=True)
  conversation = Conversation(Continuation(chat), QUESTION)
  before = conversation.prompt
  sampled = chat.encode(THOUGHTFUL + "<|im_end|>")
  say(conversation, sampled)
  conversation.add_message("Why?")
  assert conversation.prompt[: len(before + sampled)] == before + sampled
  assert chat.plain_text(conversation.prompt).count("<think>") == 1


# The system message goes into the last question, as with Mistral's template.
LAST = (
  "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
  "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
  "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
NO_THOUGHTS = (
  "{% for m in messages if '<think>' in m.content %}{{ raise_exception('a thought') }}{% endfor %}"
)
TITLE = "(message.content if message.role == 'assistant' else message.content | title)"
UNCUT = {  # template: why it cannot be cut
  LAST: "writes something else after a response in other conversations",
  families.QWEN25.replace("message.content", "(message.content | lower)"): "leaves earlier",
  families.QWEN25.replace("<|im_end|>' + '\\n'", "<|im_start|>'"): "begins with no stop token",
  NO_THOUGHTS + families.QWEN3: "refuses one of the conversations that were tried out",
  families.QWEN25.replace("message.content", TITLE): "changes the text of user messages",
}


@pytest.mark.quick
@pytest.mark.parametrize("template, reason", UNCUT.items(), ids=UNCUT.values())
def test_a_template_that_cannot_be_cut_is_rendered_anew(template, reason):
  chat = chat_of("qwen3", thinking=True, template=template)
  continuation = Continuation(chat)
  assert continuation.finding.way == "rendered" and reason in continuation.finding.reason
  assert continuation.describe().endswith("each turn's prompt is rendered as a whole")
  conversation = Conversation(continuation, QUESTION)
  for count in (1, 2):
    say(conversation, chat.encode(THOUGHTFUL))
    conversation.add_message("Why?")
    assert conversation.rendered_again == count
  turns = [dict(role="assistant", content="\n\nFour."), dict(role="user", content="Why?")]
  assert conversation.prompt == chat.prompt_tokens(QUESTION + 2 * turns)
  rows = conversation.rows()
  assert [row.prompt_tokens for row in rows] == [
    chat.prompt_tokens(QUESTION),
    chat.prompt_tokens(QUESTION + turns),
  ]


@pytest.mark.quick
def test_a_tokenizer_that_joins_turns_is_found():
  """Here a line break and the letter after it are one token; responses are kept as sampled."""
  finding = Continuation(chat_of("qwen2.5", merges=(("Ċ", "F"),))).finding
  assert finding == ("kept", "encodes a whole conversation otherwise than its parts")


@pytest.mark.quick
def test_a_template_without_turns_is_a_wrong_setting():
  alternates = "{% if messages|length > 1 %}{{ raise_exception('one question') }}{% endif %}"
  with pytest.raises(SettingError, match="refuses a conversation of user, assistant, user"):
    Continuation(chat_of("qwen2.5", template=alternates + families.QWEN25))


# ---- through the engine and into a batch ---------------------------------------------------------

ANSWERS = ("Why?", " Are you <|im_end|> sure? \n")
PLACES = [(key, turn) for key in range(4) for turn in range(3)]


def converse(chat, continuation, config):
  """Returns four conversations of three turns, and {(key, turn): (prompt, completion)}."""
  engine = LocalEngine(config, rows=4, chunk=4, columns=32)
  engine.load(params_of(config), 0)
  conversations = [Conversation(continuation, QUESTION) for _ in range(4)]
  prompts, seen = {}, {}

  def request(key, turn):
    prompts[key, turn] = conversations[key].prompt
    bias = 3.0 * key if turn < 2 else 0.0  # some responses end, some are cut off
    likely = ((continuation.glue.end, bias),)
    sampling = Sampling(4 + key, stop_tokens=chat.stop_tokens, logit_bias=likely)
    return Request((key, turn), prompts[key, turn], 1, sampling, seed=10 * key + turn)

  queue = RequestQueue([request(key, 0) for key in range(4)])
  for completion in engine.generate(queue):
    key, turn = completion.key
    seen[key, turn] = prompts[key, turn], completion
    conversations[key].add_response(completion)
    following = None
    if turn < 2:
      conversations[key].add_message(ANSWERS[turn])
      following = request(key, turn + 1)
    queue.answer(completion, following)
  return conversations, seen


def packed(chat, conversations):
  method = build.build_method(build.method_row("sdpo_blend"))
  task, group = Task("t/0", "2 + 2?", system="Be brief."), []
  for key, conversation in enumerate(conversations):
    (row,) = conversation.rows()
    reason = row.sampled[-1].completion.finish_reason
    feedback = Feedback(float(key == 0), "no")
    group.append(
      Rollout(
        task,
        row.prompt_tokens,
        row.tokens,
        row.logp,
        reason,
        "",
        feedback,
        sampled=row.sampled,
      )
    )
  packer = make_packer(method, chat, lambda _: QUESTION, fresh(), max_teacher_tokens=1000)
  return packer.pack([group])


def texts_of(rows):
  """The texts of packed rows without shared beginnings, as lists of tokens."""
  texts = []
  for token_T, segment_T in zip(rows.token_CPT[0], rows.segment_CPT[0], strict=True):
    texts += [token_T[segment_T == i].tolist() for i in range(1, segment_T.max() + 1)]
  return texts


@pytest.mark.parametrize("name, thinking", CASES)
def test_three_turns_are_trained_as_they_were_sampled(name, thinking):
  chat = chat_of(name, thinking)
  config = dataclasses.replace(MODEL_OF[name], vocab=272)
  continuation = Continuation(chat)
  conversations, seen = converse(chat, continuation, config)
  assert sorted(seen) == PLACES
  ends = [c.finish_reason for (_, turn), (_, c) in seen.items() if turn < 2]
  assert set(ends) == {"stop", "length"}
  p = packed(chat, conversations)
  grpo = build.build_method(build.method_row("grpo"))
  (signals,) = jax.jit(make_signals(config, grpo))(params_of(config), None, p.batch)
  gap_BR = np.abs(np.asarray(signals.logp_BR) - p.batch.logp_rollout_BR)
  assert np.max(gap_BR * p.batch.weight_BR) < 1e-3
  texts = texts_of(p.batch.policy)
  for key in range(4):
    prompt, last = seen[key, 2]
    fed = prompt + last.tokens
    assert fed in texts
    is_sampled = [0.0] * len(fed)
    for turn in range(3):
      begun, completion = seen[key, turn]
      assert fed[: len(begun + completion.tokens)] == begun + completion.tokens
      is_sampled[len(begun) : len(begun + completion.tokens)] = [1.0] * len(completion.tokens)
    sampled = [token for token, is_one in zip(fed, is_sampled, strict=True) if is_one]
    (b,) = [i for i, r in enumerate(p.rollouts) if r.tokens == sampled]
    count = len(sampled)
    assert p.batch.response_BR[b, :count].tolist() == sampled
    assert p.batch.weight_BR[b, :count].tolist() == [1.0] * count
    # the columns of the text that hold them
    rows, begin = p.batch.policy, p.batch.start_B[b]
    pack = b * len(rows.at_CX) // len(p.rollouts)
    at_X = rows.at_CX[pack, begin : begin + count] + 1
    text = at_X[0] - len(seen[key, 0][0])
    assert rows.token_CPT[pack].reshape(-1)[text : text + len(fed)].tolist() == fed
    assert (at_X - text).tolist() == np.flatnonzero(is_sampled).tolist()
    assert not p.batch.weight_BR[b, count:].any()
