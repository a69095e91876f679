"""Pre-training rows of the household world: whole episodes, in the ids that a run would feed.

An episode is played in the world itself (`envs/agents/household.py`) by an expert, and becomes a
conversation (`data/conversation.py`). Most rows begin as the teacher's prompt does, with the skill.
Every row draws the meanings of its novel words anew. So a meaning can only be had from the skill,
and any `words_seed` of the environment is a world that pre-training has not seen.

Where the expert cannot know what a word means it takes any appliance, each as often. That is so
without a skill, and with one that tells of other words.

Rows also hold stumbles, from which the expert goes on as best it can:

  - a command that the world does not allow, of any kind
  - a visit to a wrong place, after which it turns to the right one
  - the use of a wrong appliance, after which it goes on with the plan: using is final

A stumble has weight 0, so it is read and never imitated. Without stumbles a teacher would never
have read an episode that went wrong, such as the policy's are. The expert's commands, with the ends
of their turns, have weight 1. All else has `rest_weight`: foretelling what the world says helps to
learn to copy. Compositions of the split `unseen` never occur.
"""

import dataclasses
import functools
import random
from typing import NamedTuple

from sdpo_jax.data import corpus
from sdpo_jax.data.chat import Chat
from sdpo_jax.data.conversation import Continuation, Conversation
from sdpo_jax.envs.agents import household
from sdpo_jax.envs.agents.household import APPLIANCES, KNOWN, OBJECTS, PLACES, Goal
from sdpo_jax.envs.composed import NOVEL_WORDS
from sdpo_jax.objectives import teacher_context
from sdpo_jax.records import Completion
from sdpo_jax.text import SKILL_TEMPLATE

# One token at each border of a message: an episode is borders to a third in the longer form.
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
  "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of the kinds of rows, and how often the expert stumbles in them."""

  skill: float = 0.6  # of the rows begin with a skill
  other: float = 0.15  # of those skills tell of other words than the task's
  extra: int = 2  # most lines of a skill beside those of the task's words
  search: float = 0.1  # of the rows are of the level `search`
  inadmissible: float = 0.06  # of the actions
  wrong: float = 0.2  # of the visits; half of those to appliances with the use of a wrong one
  rest_weight: float = 0.05  # of a token that is no command


class Step(NamedTuple):
  """A command, and what the world said to it."""

  command: str
  observation: str
  is_imitated: bool


class Episode(NamedTuple):
  """One row as text."""

  message: str  # the first, as the reader gets it
  steps: list[Step]  # what the world says to the last one is read by nobody
  goal: Goal
  meaning: dict[str, str]  # novel word: its appliance


class HouseholdRows:
  """The rows of the household world for one tokenizer.

  `episode(seed, index)` and `text(seed, index)` are pure functions.
  """

  def __init__(self, chat: Chat, mixture: Mixture = Mixture()):
    self._chat, self._mixture = chat, mixture
    self._continuation = Continuation(chat)
    self._tokens = functools.cache(chat.text_tokens)

  def episode(self, seed: int, index: int) -> Episode:
    """Returns a row of this seed as text."""
    mixture = self._mixture
    rng = random.Random(f"household/rows/{seed}/{index}")
    words = rng.sample(NOVEL_WORDS, len(APPLIANCES))
    meaning = dict(zip(words, rng.sample(APPLIANCES, len(APPLIANCES)), strict=True))
    goal = _seen_goal(rng, meaning)
    level = "search" if rng.random() < mixture.search else "default"
    message = household.beginning(goal, level)
    knows = set(KNOWN.values())
    if rng.random() < mixture.skill:
      is_other = rng.random() < mixture.other
      lines = self._lines(rng, goal, meaning, is_other=is_other)
      text = "\n".join([household.GENERAL, *(household.meaning_line(*line) for line in lines)])
      message = SKILL_TEMPLATE.format(text=text) + message
      knows |= {word for word, _ in lines}
    plan = [
      (appliance, True) if word in knows else (rng.choice(APPLIANCES), False)
      for word, appliance in zip(goal.words, goal.appliances, strict=True)
    ]
    return Episode(message, Expert(rng, mixture, goal, level, plan).play(), goal, meaning)

  def text(self, seed: int, index: int) -> corpus.Text:
    """Returns a row of this seed as tokens and their weights."""
    episode, rest = self.episode(seed, index), self._mixture.rest_weight
    first = [{"role": "user", "content": episode.message}]
    conversation = Conversation(self._continuation, first)
    for number, step in enumerate(episode.steps):
      if number:
        conversation.add_message(episode.steps[number - 1].observation)
      tokens = self._tokens(step.command) + [self._chat.stop_tokens[0]]
      conversation.add_response(Completion("", 0, tokens, [0.0] * len(tokens), "stop"))
    (row,) = conversation.rows()
    tokens = list(row.prompt_tokens)
    weights = [0.0] + [rest] * (len(tokens) - 1)  # nothing foretells the first
    for step, segment in zip(episode.steps, row.sampled, strict=True):
      response = segment.completion.tokens
      tokens += [*segment.before, *response]
      weights += [rest] * len(segment.before) + [float(step.is_imitated)] * len(response)
    return corpus.Text(tokens, weights)

  def _lines(
    self, rng: random.Random, goal: Goal, meaning: dict[str, str], *, is_other: bool
  ) -> list[tuple[str, str]]:
    """Returns (word, appliance) of the lines of a skill, in any order."""
    every = {**meaning, **{word: appliance for appliance, word in KNOWN.items()}}
    others = rng.sample(
      sorted(every.keys() - set(goal.words)), len(goal.words) + self._mixture.extra
    )
    chosen, others = others[: len(goal.words)], others[len(goal.words) :]
    if not is_other:
      chosen = list(goal.words)
    chosen += others[: rng.randint(0, self._mixture.extra)]
    rng.shuffle(chosen)
    return [(word, every[word]) for word in chosen]


def _seen_goal(rng: random.Random, meaning: dict[str, str]) -> Goal:
  while True:
    goal = household.draw(rng, meaning)
    if not household.is_unseen(goal.words, goal.item, goal.place):
      return goal


class Expert:
  """Plays one episode, and stumbles now and then.

  plan: (appliance, whether it is known to be the right one) of each process.
  """

  def __init__(
    self,
    rng: random.Random,
    mixture: Mixture,
    goal: Goal,
    level: str,
    plan: list[tuple[str, bool]],
  ):
    self._rng, self._mixture, self._goal, self._plan = rng, mixture, goal, plan
    self._world = household.World(goal, level, household.LIMIT)
    self._unsearched = list(PLACES) if level == "search" else [goal.where]
    self._at, self._carries, self._used = "", False, 0
    self._steps: list[Step] = []

  def play(self) -> list[Step]:
    """Plays to the end, which may be the limit of turns."""
    is_over = False
    while not is_over:
      if self._rng.random() < self._mixture.inadmissible:
        is_over = self._do(self._inadmissible(), is_imitated=False)
        continue
      command = self._next()
      wrong = self._stumble(command)
      if wrong:
        is_over = any(self._do(step, is_imitated=False) for step in wrong)
      else:
        is_over = self._do(command, is_imitated=True)
    return self._steps

  def _do(self, command: str, *, is_imitated: bool) -> bool:
    """Carries a command out; True at the end of the episode."""
    turn = self._world.step(command)
    self._steps.append(Step(command, turn.observation, is_imitated))
    if turn.valid:
      verb, _, name = command.partition(" ")
      if verb == "go":
        self._at = name
        self._unsearched = [place for place in self._unsearched if place != name]
      self._carries = self._carries or verb == "take"
      self._used += verb == "use"
    return turn.done

  def _next(self) -> str:
    """Returns the command that comes next in the plan."""
    goal = self._goal
    if not self._carries:
      if self._at == goal.where:
        return f"take {goal.item}"
      return f"go {self._rng.choice(self._unsearched or [goal.where])}"
    if self._used < len(self._plan):
      appliance, _ = self._plan[self._used]
      return f"use {appliance}" if self._at == appliance else f"go {appliance}"
    return f"put {goal.item}" if self._at == goal.place else f"go {goal.place}"

  def _stumble(self, command: str) -> list[str]:
    """Returns what is done instead of a visit, mostly nothing.

    A guess cannot be wrong: all appliances are as good.
    """
    verb, _, name = command.partition(" ")
    is_guess = name in APPLIANCES and not self._plan[self._used][1]
    if verb != "go" or is_guess or self._rng.random() >= self._mixture.wrong:
      return []
    if name in APPLIANCES and self._rng.random() < 0.5:
      wrong = self._rng.choice([other for other in APPLIANCES if other != name])
      visit = [] if wrong == self._at else [f"go {wrong}"]
      return [*visit, f"use {wrong}"]
    return [
      f"go {self._rng.choice([p for p in (*APPLIANCES, *PLACES) if p not in (name, self._at)])}"
    ]

  def _inadmissible(self) -> str:
    allowed = self._world.commands()
    names = {"go": (*APPLIANCES, *PLACES), "use": APPLIANCES, "take": OBJECTS, "put": OBJECTS}
    while True:
      verb = self._rng.choice(sorted(names))
      command = f"{verb} {self._rng.choice(names[verb])}"
      if command not in allowed:
        return command


# ---- the tokenizer -------------------------------------------------------------------------------


def pieces() -> list[str]:
  """Returns the natural pieces of the world's texts; a command is two, a long phrase one."""
  text = household.beginning(Goal(("WORD",), (), "", "", ""), "search")
  opening, _, _ = text.partition("WORD")
  head, _ = SKILL_TEMPLATE.split("{text}")
  return [
    *APPLIANCES,
    *KNOWN.values(),
    *OBJECTS,
    *PLACES,
    *NOVEL_WORDS,
    opening,
    f"\n\n{opening}",
    f"{head}{household.GENERAL}\n",
    head,
    household.GENERAL,
    " means the ",
    ".\n",
    " then ",
    " the ",
    " and put it on the ",
    ". The ",
    " is on the ",
    ".",
    "You arrive at ",
    ". On the ",
    ", you see a ",
    "You pick up the ",
    " from the ",
    "You use the ",
    " on the ",
    "You put the ",
    household.NOTHING,
    "go ",
    "take ",
    "use ",
    "put ",
    "> ",
    teacher_context.SOLUTION,
    teacher_context.FEEDBACK,
    teacher_context.CLOSING,
  ]


def build_tokenizer():
  """Returns the tokenizer of the household's base model, as a fast tokenizer of transformers."""
  return corpus.make_tokenizer(pieces(), chat_template=CHAT_TEMPLATE, borders=ROLES)
