"""Plays episodes from Python, and returns them turn by turn, as a person reads them.

  c = main.parse(["", "--config=configs/agentic.py"])[1]
  for episode in transcripts.play(c, tasks=2):
    print(episode)

Nothing is trained and nothing is written. The policy is config.model.path: a name, a hub id, or a
directory that `sdpo_jax.export` has written of a run.
"""

import dataclasses
from typing import NamedTuple

from sdpo_jax.config import validate
from sdpo_jax.data.chat import Chat
from sdpo_jax.envs.base import find_env, plays
from sdpo_jax.errors import SettingError, blame_settings
from sdpo_jax.records import Rollout, Sampling, Task
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.session import open_session


class SpokenTurn(NamedTuple):
  """One turn: what the policy wrote, and what the world said to it."""

  message: str
  tokens: list[str]  # the text of each
  logp: list[float]  # nats, of each token
  # None: the world was not asked any more, or did not answer
  observation: str | None
  reward: float  # of the episode so far, in [0, 1]
  valid: bool  # False: the message held no action that the world allows


@dataclasses.dataclass(frozen=True)
class Transcript:
  """One episode."""

  task: Task
  prompt: str  # what the policy reads before its first turn
  turns: list[SpokenTurn]
  reward: float
  end: str  # done | budget | lost, see episodes.py

  def __str__(self) -> str:
    lines = [self.prompt, ""]
    for turn in self.turns:
      lines.append(f"> {turn.message}")
      if turn.observation is not None:
        lines.append(turn.observation)
    return "\n".join([*lines, "", f"end: {self.end}, reward {self.reward:g}"])


def play(c, *, split: str = "heldout", tasks: int = 1, episodes: int = 1) -> list[Transcript]:
  """Plays so many episodes of each of the first tasks of a split, task by task.

  Episodes depend on config.seed, the task and their number alone. SettingError for a configuration
  that cannot run, or whose environment judges single responses.
  """
  with blame_settings():
    validate(c)
    if not plays(find_env(c.env.name)):
      raise SettingError(
        f"config.env.name={c.env.name!r} judges single responses and plays no episodes"
      )
  with open_session(c, splits={split: "the transcripts"}) as session:
    player, chat = session.collector, session.chat
    sampling = Sampling(
      c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, chat.stop_tokens
    )
    asked = [player.env.task(split, i) for i in range(tasks)]
    groups = player.collect(
      session.params,
      asked,
      n=episodes,
      sampling=sampling,
      seeds=[prompt_seed(c.seed, "transcript", i) for i in range(tasks)],
    )
    return [
      transcript(rollout, _text(player.env.prompt(rollout.task)), chat)
      for group in groups
      for rollout in group
    ]


def transcript(rollout: Rollout, prompt: str, chat: Chat) -> Transcript:
  """Returns a played episode turn by turn. prompt: what was said before its first turn."""
  turns = []
  for segment, answer, reward in rollout.turn_by_turn():
    tokens = segment.completion.tokens
    turn = SpokenTurn(
      chat.response_text(tokens),
      chat.token_strings(tokens),
      segment.completion.logp,
      None if answer is None else answer.observation,
      reward,
      answer is not None and answer.valid,
    )
    turns.append(turn)
  return Transcript(rollout.task, prompt, turns, rollout.feedback.reward, rollout.finish_reason)


def _text(messages: list[dict[str, str]]) -> str:
  return "\n".join(message["content"] for message in messages)
