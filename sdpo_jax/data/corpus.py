"""The pre-training corpora of the tiny base models: statements to programs or steps, with and
without hindsight.

A row is one user message and one response. The message is the bare statement, or the very prompt
that the teacher reads in
SDPO: the statement with the feedback on a failed attempt, or with a correct solution, or both, or
with notes on what other attempts would have received (`objectives/counterfactual`); or it asks
which verdict another attempt would receive, and the response is that verdict. Novel words get a
*new* random meaning in every row, so the model can only learn that such a word means something that
the feedback shows. Compositions of the
`unseen` split never occur.

Also the tokenizers: Unigram models over the natural pieces of these texts, with all bytes as
fallback, so that any text can be written and a program takes about ten tokens.
"""

import dataclasses
import random
import string
from typing import Any, NamedTuple

from sdpo_jax.envs import arithmetic, composed, tinycode
from sdpo_jax.objectives import notes, teacher_context
from sdpo_jax.records import Alternative, Feedback, Rollout, Task

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of the kinds of rows (they add up to 1) and how the problems in them are drawn."""

  plain: float = 0.2
  feedback: float = 0.6
  solution: float = 0.12
  both: float = 0.08
  # feedback, or a solution, and notes on other attempts
  notes: float = 0.0
  imagine: float = 0.0  # which verdict would another attempt receive?
  lengths: tuple[float, ...] = (0.3, 0.55, 0.15)  # one, two, three operations
  # chance that an operation is named by a novel word
  novel: float = 0.5
  twist: float = 0.1  # chance of a misleading paraphrase
  # chance that the failed attempt gets a known operation wrong too
  slip: float = 0.15
  # the most other attempts that a row of notes tells of
  alternatives: int = 2
  success: float = 0.1  # chance that another attempt is right
  # chance that an attempt, where others are told of, gets a novel operation right
  learnt: float = 0.4

  def __post_init__(self):
    shares = {view: getattr(self, view) for view in VIEWS}
    if min(shares.values()) < 0 or not any(shares.values()):
      raise ValueError(
        f"config.corpus: the shares {shares} must be at least 0, and not all of them 0"
      )


VIEWS = ("plain", "feedback", "solution", "both", "notes", "imagine")


class Problem(NamedTuple):
  """One row: what the user says, what the assistant answers, and what a judge needs."""

  message: str
  response: str
  ops: tuple[str, ...]
  kind: str  # input type
  details: Any  # the domain's
  novel: tuple[bool, ...]  # per operation: named by a novel word


class Corpus:
  """`problem(seed, index)` is a pure function: any row can be rebuilt, and reading resumes
  anywhere.
  """

  def __init__(self, domain: composed.Domain, mixture: Mixture = Mixture()):
    self.domain, self.mixture = domain, mixture
    self.keys = {
      n: [k for k in domain.compositions(n) if not composed.is_unseen(k[:-1])]
      for n, weight in enumerate(mixture.lengths, 1)
      if weight
    }

  def problem(self, seed: int, index: int) -> Problem:
    m, domain, rng = self.mixture, self.domain, random.Random(f"corpus/{seed}/{index}")
    n = rng.choices(range(1, len(m.lengths) + 1), m.lengths)[0]
    *ops, kind = rng.choice(self.keys[n])
    ops = tuple(ops)
    words = dict(zip(domain.phrases, rng.sample(composed.NOVEL_WORDS, len(domain.phrases))))
    novel = {o: rng.random() < m.novel for o in domain.phrases}
    phrase = {
      o: composed.novel_phrase(words[o]) if novel[o] else rng.choice(domain.phrases[o])
      for o in domain.phrases
    }
    twist = rng.choice(("not", "order")) if rng.random() < m.twist else None
    distractor = phrase[rng.choice([o for o in domain.phrases if o not in ops])]
    header = rng.randrange(composed.HEADERS)
    view = rng.choices(VIEWS, [getattr(m, view) for view in VIEWS])[0]
    details = domain.draw(rng, ops, kind)
    statement = domain.statement(
      composed.body([phrase[o] for o in ops], twist=twist, distractor=distractor),
      kind,
      details,
      header,
    )
    response, _ = domain.answer(ops, details)
    answer = Problem(statement, response, ops, kind, details, tuple(novel[o] for o in ops))
    if view == "plain":
      return answer
    if view == "notes":
      return answer._replace(message=self._noted(rng, answer, novel).render(statement))
    if view == "imagine":
      attempt, other = self._distinct(rng, answer, novel, 1)
      return answer._replace(
        message=notes.imagining(statement, attempt, other),
        response=notes.true_feedback(other, 0.5),
      )
    context = teacher_context.Context(
      solution=response if view in ("solution", "both") else "",
      feedback=self._failed(rng, ops, kind, details, novel)[1]
      if view in ("feedback", "both")
      else "",
    )
    return answer._replace(message=context.render(statement))

  def _noted(
    self, rng: random.Random, answer: Problem, novel: dict[str, bool]
  ) -> teacher_context.Context:
    """What training would show of a failed attempt that others are told of: judged, or half of the
    time imagined, by one who is never wrong.
    """
    while True:
      attempt, *others = self._distinct(
        rng, answer, novel, rng.randint(1, self.mixture.alternatives)
      )
      imagined = rng.random() < 0.5
      told = [
        Alternative(r, "samples", notes.true_feedback(r, 0.5) if imagined else None) for r in others
      ]
      attempt = dataclasses.replace(attempt, alternatives=told)
      ((context, _),) = notes.further_readings(
        notes.Notes(), teacher_context.FeedbackOrSolution(), [attempt], 0
      )
      if context.notes:  # a judged success alone is a solution and leaves none
        return context

  def _distinct(
    self, rng: random.Random, answer: Problem, novel: dict[str, bool], most: int
  ) -> list[Rollout]:
    """A failed attempt and one to `most` others, some of them right, that say something else: by a
    policy that has learnt some of the novel words.
    """

    def judged(success: float) -> Rollout:
      right = rng.random() < success
      while True:
        guessed = {o: new and rng.random() >= self.mixture.learnt for o, new in novel.items()}
        ops, said = (
          (answer.ops, "")
          if right
          else self._failed(rng, answer.ops, answer.kind, answer.details, guessed)
        )
        text = self.domain.answer(ops, answer.details)[0]
        # the right number by other steps is no failure
        if right or not self.domain.solves(text, answer.ops, answer.kind, answer.details):
          return Rollout(
            Task("", answer.message), [], [], [], "stop", text, Feedback(float(right), said)
          )

    while True:
      attempt, *others = judged(0.0), *(judged(self.mixture.success) for _ in range(most))
      told = notes.distinct(
        [Alternative(r, "samples") for r in others],
        attempt,
        most=most,
        success_threshold=0.5,
        behaviour=lambda r: (r.feedback.reward, r.feedback.text),
      )
      if told:
        return [attempt, *(a.rollout for a in told)]

  def _failed(
    self, rng: random.Random, ops, kind: str, details, novel: dict[str, bool]
  ) -> tuple[list[str], str]:
    """A failed attempt, the operations that the model could not know being guessed, and what the
    judge would say of it.
    """
    types = self.domain.types
    while True:
      attempt, now = [], kind
      for op in ops:
        guessed = novel[op] or rng.random() < self.mixture.slip
        fits = [o for o in types if now in types[o]]
        if guessed:  # mostly an operation that fits the type, sometimes one that raises
          op = rng.choice(fits if rng.random() < 0.9 else list(types))
        attempt.append(op)
        now = types[op].get(now, now)
      said = self.domain.complain(attempt, ops, details)
      if said:
        return attempt, said
      if not any(novel[o] for o in ops):  # every word known: let one operation slip for certain
        novel = novel | {rng.choice(ops): True}


def _tinycode_pieces() -> list[str]:
  statement = [
    h.removesuffix("{}.").format(i) for h in tinycode.HEADERS for i in tinycode.INPUTS.values()
  ]
  code = [
    "def f(x):",
    "\n    x = ",
    "\n    return x",
    "x[",
    "::-1",
    "1:",
    ":-1",
    "::2",
    "]",
    "x + x",
    "sorted(x",
    ")",
    ", reverse=True)",
    "list(dict.fromkeys(x))",
    "[v for v in x if ",
    "v % 2 == 0",
    "v % 2 == 1",
    "v > 0",
    "[",
    " for v in x]",
    "v * 2",
    "v + 1",
    "-v",
    "v * v",
    "sum(x)",
    "max(x)",
    "min(x)",
    "len(x)",
    "x + 10",
    "x * 3",
    "x % 7",
    "x.upper()",
    "x.swapcase()",
  ]
  judge = [
    "Runtime error\n",
    "Wrong answer\n",
    "Input: ",
    "\nOutput: ",
    "\nExpected: ",
    "\nInput: ",
    "\nLine ",
    ": x = ",
    ", ",
    "TypeError: ",
    "AttributeError: ",
    "ValueError: ",
    "IndexError: ",
    "'int' object ",
    "'list' object ",
    "'str' object ",
    "is not subscriptable",
    "is not iterable",
    "has no attribute ",
    "'upper'",
    "'swapcase'",
    "has no len()",
    "object of type 'int' ",
    "unsupported operand type(s) for ",
    "bad operand type for ",
    "not supported between instances of ",
    "not all arguments converted during string formatting",
    'can only concatenate str (not "int") to str',
    'can only concatenate list (not "int") to list',
    "can't multiply sequence by non-int of type ",
    "must be str, not int",
    "iterable argument is empty",
    "max() ",
    "min() ",
    "'str' and 'int'",
    "'int' and 'str'",
    "'list' and 'int'",
    "+: ",
    "%: ",
    "unary -: ",
  ]
  return statement + _SENTENCE + code + judge


def _arithmetic_pieces() -> list[str]:
  statement = [
    *arithmetic.NAMES,
    *arithmetic.THINGS,
    " has ",
    " ",
    ". Take their number: ",
    ". What is the result?",
    "Start from the number of ",
    " that ",
    " has: ",
    ". What comes out?",
  ]
  steps = [")", " + ", " - ", " * ", " // ", " % ", " = ", "\n", "\\boxed{", "}"]
  judge = [
    "Wrong answer\n",
    "Wrong format\n",
    "Step ",
    ": ",
    " came to ",
    ".\nExpected: ",
    " is ",
    ", not ",
    ".",
    " does not go on from ",
    " divides by zero.",
    "There are ",
    " steps",
    "The box says ",
    ", the steps come to ",
    "The last line must be the result in a box: \\boxed{...}",
    " is not a calculation: ",
  ]
  return statement + _SENTENCE + steps + judge


_SENTENCE = [", then ", " after you ", " (do not ", ")."]
DOMAINS = {
  "tinycode": (tinycode.DOMAIN, _tinycode_pieces),
  "arithmetic": (arithmetic.DOMAIN, _arithmetic_pieces),
}


def build_tokenizer(name: str):
  """The tokenizer of a domain's base model, as a transformers fast tokenizer."""
  import tokenizers
  import transformers

  domain, pieces = DOMAINS[name]
  phrases = [p for known in domain.phrases.values() for p in known] + [
    composed.novel_phrase(w) for w in composed.NOVEL_WORDS
  ]
  chat = [
    "system\n",
    "user\n",
    "assistant\n",
    teacher_context.SOLUTION,
    teacher_context.FEEDBACK,
    teacher_context.CLOSING,
  ]
  natural = dict.fromkeys(phrases + pieces() + chat + [str(i) for i in range(-99, 100)])
  letters = [c for c in string.printable if c not in "\x0b\x0c" and c not in natural]
  byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
  # The fewest pieces win, and among equals the longest first piece: a constant price with a small
  # bonus for length.
  vocabulary = (
    [("<unk>", 0.0)]
    + [(p, -10.0 + 0.01 * min(len(p), 90)) for p in natural]
    + [(c, -10.5) for c in letters]
    + [(b, -20.0) for b in byte_pieces]
  )
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=END,
    unk_token="<unk>",
    additional_special_tokens=[START],
    clean_up_tokenization_spaces=False,
    model_max_length=1024,
  )
  fast.chat_template = CHAT_TEMPLATE
  return fast
