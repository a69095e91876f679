"""Makes the pre-training corpora of the tiny base models, and their tokenizers.

A row is one user message and one response, a program or steps. The view of a row says what the
message is:

  plain      the bare statement
  feedback   the statement with the feedback on a failed attempt
  solution   the statement with a correct solution
  both       the statement with feedback and solution
  notes      the statement with feedback, or a solution, and notes on what other attempts would have
             received (`objectives/notes`)
  imagine    asks which verdict another attempt would receive; the response is that verdict

From `feedback` on, the message is the very prompt that the teacher, or the policy that imagines,
reads in SDPO. Novel words get a *new* random meaning in every row. The model can therefore only
learn that such a word means something that the feedback shows. Compositions of the `unseen` split
never occur.

The tokenizers are Unigram models over the natural pieces of these texts, with all bytes as
fallback. Any text can be written, and a program takes about ten tokens.
"""

import dataclasses
import random
import string
from typing import Any, NamedTuple

from sdpo_jax.data.chat import Chat
from sdpo_jax.envs import arithmetic, composed, tinycode
from sdpo_jax.objectives import notes, teacher_context
from sdpo_jax.records import Alternative, Feedback, Rollout, Task

VIEWS = ("plain", "feedback", "solution", "both", "notes", "imagine")
# An attempt with a lower reward has failed. Rewards are 0 and 1 here.
SUCCESS_THRESHOLD = 0.5
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
  "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of the views, which add up to 1, and how the problems in them are drawn."""

  plain: float = 0.2
  feedback: float = 0.6
  solution: float = 0.12
  both: float = 0.08
  notes: float = 0.0
  imagine: float = 0.0
  lengths: tuple[float, ...] = (0.3, 0.55, 0.15)  # shares of one, two, three operations
  novel: float = 0.5  # chance that an operation is named by a novel word
  twist: float = 0.1  # chance of a misleading paraphrase
  slip: float = 0.15  # chance that the failed attempt gets a known operation wrong too
  alternatives: int = 2  # most other attempts in a row of notes
  success: float = 0.1  # chance that another attempt is right
  # Chance that an attempt in a row of notes or imagination gets a novel operation right.
  learnt: float = 0.4

  def __post_init__(self):
    shares = {view: getattr(self, view) for view in VIEWS}
    if not 1 <= len(self.lengths) <= 3 or min(self.lengths) < 0 or not any(self.lengths):
      raise ValueError(
        f"config.corpus.lengths={self.lengths} must be one to three shares of at least 0, "
        "and not all of them 0"
      )
    if min(shares.values()) < 0 or not any(shares.values()):
      raise ValueError(
        f"config.corpus: the shares {shares} must be at least 0, and not all of them 0"
      )


class Problem(NamedTuple):
  """One row: what the user says, what the assistant answers, and what a judge needs."""

  message: str
  response: str
  ops: tuple[str, ...]
  kind: str  # input type
  details: Any  # the domain's
  novel: tuple[bool, ...]  # whether each operation is named by a novel word


class Text(NamedTuple):
  """A row as tokens."""

  tokens: list[int]
  weights: list[float]  # of each token's loss; 0: it is read alone


class Corpus:
  """The rows of one domain.

  `problem(seed, index)` is a pure function: any row can be rebuilt, and reading resumes anywhere.
  """

  def __init__(self, domain: composed.Domain, mixture: Mixture = Mixture()):
    self.domain, self.mixture = domain, mixture
    # Number of operations -> (*ops, kind) of each composition that pre-training may show.
    self._compositions = {}
    for length, share in enumerate(mixture.lengths, 1):
      if share:
        compositions = domain.compositions(length)
        self._compositions[length] = [c for c in compositions if not composed.is_unseen(c[:-1])]

  def problem(self, seed: int, index: int) -> Problem:
    """Returns a row of the corpus of this seed."""
    mixture, domain = self.mixture, self.domain
    # Every draw below is part of the row: another order of draws is another corpus.
    rng = random.Random(f"corpus/{seed}/{index}")
    lengths = range(1, len(mixture.lengths) + 1)
    (length,) = rng.choices(lengths, mixture.lengths)
    *ops, kind = rng.choice(self._compositions[length])
    ops = tuple(ops)
    words = rng.sample(composed.NOVEL_WORDS, len(domain.phrases))
    word_of = dict(zip(domain.phrases, words, strict=True))
    novel = {op: rng.random() < mixture.novel for op in domain.phrases}
    phrases = {
      op: composed.novel_phrase(word_of[op]) if novel[op] else rng.choice(domain.phrases[op])
      for op in domain.phrases
    }
    sentence = self._sentence(rng, ops, phrases)
    header = rng.randrange(composed.HEADERS)
    (view,) = rng.choices(VIEWS, [getattr(mixture, view) for view in VIEWS])
    details = domain.draw(rng, ops, kind)
    row = Problem(
      message=domain.statement(sentence, kind, details, header),
      response=domain.answer(ops, details)[0],
      ops=ops,
      kind=kind,
      details=details,
      novel=tuple(novel[op] for op in ops),
    )
    return self._in_view(view, rng, row, novel)

  def text(self, chat: Chat, seed: int, index: int) -> Text:
    """Returns a row of the corpus of this seed as tokens; the response alone has weight."""
    problem = self.problem(seed, index)
    prompt = chat.prompt_tokens([{"role": "user", "content": problem.message}])
    response = chat.text_tokens(problem.response) + [chat.stop_tokens[0]]
    return Text(prompt + response, [0.0] * len(prompt) + [1.0] * len(response))

  def _sentence(self, rng: random.Random, ops: tuple[str, ...], phrases: dict[str, str]) -> str:
    """Returns the steps as a sentence, sometimes a misleading paraphrase."""
    twist = None
    if rng.random() < self.mixture.twist:
      twist = rng.choice(("not", "order"))
    distractor = rng.choice([op for op in phrases if op not in ops])
    return composed.body([phrases[op] for op in ops], twist=twist, distractor=phrases[distractor])

  def _in_view(
    self, view: str, rng: random.Random, row: Problem, novel: dict[str, bool]
  ) -> Problem:
    """Returns a plain row as the view shows it. novel: the operations with a novel word."""
    if view == "plain":
      return row
    if view == "notes":
      context = self._context_with_notes(rng, row, novel)
      return row._replace(message=context.render(row.message))
    if view == "imagine":
      attempt, other = self._attempts(rng, row, novel, most=1)
      return row._replace(
        message=notes.imagining(row.message, attempt, other),
        response=notes.true_feedback(other, SUCCESS_THRESHOLD),
      )
    solution = row.response if view in ("solution", "both") else ""
    feedback = ""
    if view in ("feedback", "both"):
      _, feedback = self._failed(rng, row, novel)
    context = teacher_context.Context(solution=solution, feedback=feedback)
    return row._replace(message=context.render(row.message))

  def _context_with_notes(
    self, rng: random.Random, row: Problem, novel: dict[str, bool]
  ) -> teacher_context.Context:
    """Returns what the teacher would read in training of a failed attempt with alternatives.

    Their feedback is the judge's, or half of the time imagined by one who is never wrong.
    """
    while True:
      most = rng.randint(1, self.mixture.alternatives)
      attempt, *others = self._attempts(rng, row, novel, most)
      imagined = rng.random() < 0.5
      alternatives = []
      for other in others:
        feedback = notes.true_feedback(other, SUCCESS_THRESHOLD) if imagined else None
        alternatives.append(Alternative(other, "samples", feedback))
      attempt = dataclasses.replace(attempt, alternatives=alternatives)
      ((context, _),) = notes.further_readings(
        notes.Notes(), teacher_context.FeedbackOrSolution(), [attempt], 0
      )
      if context.notes:  # a success that was judged is a solution and leaves no note
        return context

  def _attempts(
    self, rng: random.Random, row: Problem, novel: dict[str, bool], most: int
  ) -> list[Rollout]:
    """Returns a failed attempt and one to `most` others that differ, some of them right.

    They are those of a policy that has learnt some of the novel words.
    """
    while True:
      attempt = self._attempt(rng, row, novel, success=0.0)
      others = [self._attempt(rng, row, novel, self.mixture.success) for _ in range(most)]
      different = notes.distinct(
        [Alternative(other, "samples") for other in others],
        attempt,
        most=most,
        success_threshold=SUCCESS_THRESHOLD,
        behaviour=lambda rollout: (rollout.feedback.reward, rollout.feedback.text),
      )
      if different:
        return [attempt, *(alternative.rollout for alternative in different)]

  def _attempt(
    self, rng: random.Random, row: Problem, novel: dict[str, bool], success: float
  ) -> Rollout:
    """Returns an attempt with its feedback. success: the chance that it is right."""
    is_right = rng.random() < success
    while True:
      learnt = self.mixture.learnt
      # Drawn for an attempt that is right as well, which keeps the shipped models' corpora.
      guessed = {op: new and rng.random() >= learnt for op, new in novel.items()}
      ops, feedback = row.ops, ""
      if not is_right:
        ops, feedback = self._failed(rng, row, guessed)
      text, _ = self.domain.answer(ops, row.details)
      # The right number by other steps is no failure.
      if is_right or not self.domain.solves(text, row.ops, row.kind, row.details):
        return Rollout(
          task=Task("", row.message),
          prompt_tokens=[],
          tokens=[],
          logp=[],
          finish_reason="stop",
          text=text,
          feedback=Feedback(float(is_right), feedback),
        )

  def _failed(
    self, rng: random.Random, row: Problem, unknown: dict[str, bool]
  ) -> tuple[list[str], str]:
    """Returns the operations of a failed attempt, and what the judge says of it.

    unknown: the operations that the model cannot know, which it guesses.
    """
    types = self.domain.types
    while True:
      attempt, now = [], row.kind
      for op in row.ops:
        # Short circuit: a slip is drawn for known operations only.
        if unknown[op] or rng.random() < self.mixture.slip:
          # Mostly an operation that fits the type, sometimes one that raises.
          fitting = [o for o in types if now in types[o]]
          op = rng.choice(fitting if rng.random() < 0.9 else list(types))
        attempt.append(op)
        now = types[op].get(now, now)
      feedback = self.domain.complain(attempt, row.ops, row.details)
      if feedback:
        return attempt, feedback
      if not any(unknown[op] for op in row.ops):
        # Every word is known: one operation slips for certain.
        unknown = unknown | {rng.choice(row.ops): True}


# The natural pieces of each domain's texts, from which its tokenizer is built.
_CHAT_PIECES = [
  "system\n",
  "user\n",
  "assistant\n",
  teacher_context.SOLUTION,
  teacher_context.FEEDBACK,
  teacher_context.CLOSING,
]
_SENTENCE_PIECES = [", then ", " after you ", " (do not ", ")."]
_PROGRAM_PIECES = [
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
_PROGRAM_JUDGE_PIECES = [
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
_ARITHMETIC_PIECES = [
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
_STEP_PIECES = [")", " + ", " - ", " * ", " // ", " % ", " = ", "\n", "\\boxed{", "}"]
_STEP_JUDGE_PIECES = [
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


def _tinycode_pieces() -> list[str]:
  statement = [
    header.removesuffix("{}.").format(name)
    for header in tinycode.HEADERS
    for name in tinycode.INPUTS.values()
  ]
  return statement + _SENTENCE_PIECES + _PROGRAM_PIECES + _PROGRAM_JUDGE_PIECES


def _arithmetic_pieces() -> list[str]:
  return _ARITHMETIC_PIECES + _SENTENCE_PIECES + _STEP_PIECES + _STEP_JUDGE_PIECES


DOMAINS = {
  "tinycode": (tinycode.DOMAIN, _tinycode_pieces),
  "arithmetic": (arithmetic.DOMAIN, _arithmetic_pieces),
}


def build_tokenizer(name: str):
  """Returns the tokenizer of a domain's base model, as a fast tokenizer of transformers."""
  domain, pieces = DOMAINS[name]
  phrases = [phrase for phrases in domain.phrases.values() for phrase in phrases]
  novel_phrases = [composed.novel_phrase(word) for word in composed.NOVEL_WORDS]
  numbers = [str(number) for number in range(-99, 100)]
  natural = phrases + novel_phrases + pieces() + _CHAT_PIECES + numbers
  return make_tokenizer(natural, chat_template=CHAT_TEMPLATE, borders=(START,))


def make_tokenizer(natural: list[str], *, chat_template: str, borders: tuple[str, ...]):
  """Returns a tokenizer of natural pieces, with all letters and bytes as fallback.

  borders: the special tokens with which the template begins a message.
  """
  import tokenizers
  import transformers

  vocabulary = _vocabulary(natural)
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
    additional_special_tokens=list(borders),
    clean_up_tokenization_spaces=False,
    model_max_length=1024,
  )
  fast.chat_template = chat_template
  return fast


def _vocabulary(natural: list[str]) -> list[tuple[str, float]]:
  """Returns (piece, score) for each token of a Unigram model.

  The fewest pieces win, and among equals the longest first piece: all natural pieces have the same
  score with a small bonus for length. Letters and bytes cost more.
  """
  natural = list(dict.fromkeys(natural))
  letters = [c for c in string.printable if c not in "\x0b\x0c" and c not in natural]
  vocabulary = [("<unk>", 0.0)]
  vocabulary += [(piece, -10.0 + 0.01 * min(len(piece), 90)) for piece in natural]
  vocabulary += [(letter, -10.5) for letter in letters]
  vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
  return vocabulary
