"""How well a model acts in the household world: alone, and with what a teacher would read.

The views are what stands before the first message:

  alone         nothing
  skill         the skill of the task, as the teacher reads it
  random_skill  lines of other words: what a text of its kind does by itself
"""

from sdpo_jax.data.chat import Chat
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.envs.agents.household import Household, World
from sdpo_jax.episodes import Played, Player
from sdpo_jax.play import Room
from sdpo_jax.records import Rollout, Sampling, Task
from sdpo_jax.text import SKILL_TEMPLATE

VIEWS = ("alone", "skill", "random_skill")


class _Informed:
  """The household world, whose first message tells the skill."""

  def __init__(self, env: Household):
    self._env = env

  def start(self, task: Task) -> "_InformedWorld":
    return _InformedWorld(self._env.start(task), self._env.skill_text(task))


class _InformedWorld:
  """One episode of it."""

  def __init__(self, world: World, skill: str):
    self._skill = skill
    self._world, self.step, self.close = world, world.step, world.close

  def prompt(self) -> list[dict[str, str]]:
    (message,) = self._world.prompt()
    return [message | {"content": SKILL_TEMPLATE.format(text=self._skill) + message["content"]}]


def play(params, engine: LocalEngine, chat: Chat, view: str, *, tasks: int) -> list[Rollout]:
  """Plays one episode of each of the first held-out tasks at temperature 1, in one of VIEWS."""
  env = Household(skill="random" if view == "random_skill" else "matched")
  player = Player(
    Played(env if view == "alone" else _Informed(env)),
    chat,
    engine,
    Room(max_prompt_tokens=512, max_episode_tokens=512),
    threads=1,
    timeout_s=60.0,
  )
  sampling = Sampling(max_new_tokens=8, stop_tokens=chat.stop_tokens)
  try:
    groups = player.collect(
      params,
      [env.task("heldout", i) for i in range(tasks)],
      n=1,
      sampling=sampling,
      seeds=list(range(tasks)),
    )
  finally:
    player.close()
  return [rollout for (rollout,) in groups]


def success(params, engine: LocalEngine, chat: Chat, *, tasks: int) -> dict[str, float]:
  """Returns the share of tasks that are done, by view, and by view and kind of task.

  "eval/skill_1_of_2" is that of the tasks with two words, one of them novel.
  """
  shares = {}
  for view in VIEWS:
    rewards: dict[str, list[float]] = {"": []}
    for rollout in play(params, engine, chat, view, tasks=tasks):
      kind = "_" + rollout.task.data["kind"].replace(" novel of ", "_of_")
      rewards[""].append(rollout.feedback.reward)
      rewards.setdefault(kind, []).append(rollout.feedback.reward)
    for kind, values in sorted(rewards.items()):
      shares[f"eval/{view}{kind}"] = sum(values) / len(values)
  return shares


def print_success(shares: dict[str, float], tasks: int) -> None:
  """Prints the shares, a line for each view."""
  print(f"held-out tasks of the household that are done at temperature 1 ({tasks} tasks):")
  for view in VIEWS:
    prefix = f"eval/{view}_"
    kinds = [
      f"{share:.1%} {key.removeprefix(prefix)}"
      for key, share in shares.items()
      if key.startswith(prefix)
    ]
    print(f"  {view}: {shares[f'eval/{view}']:.1%}; novel: {', '.join(kinds)}")
