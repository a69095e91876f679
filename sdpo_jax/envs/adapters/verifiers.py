"""Plays environments of verifiers (to version 0.3): rows, `env_response`, and a rubric's rewards.

An environment is what `verifiers.load_environment(id)` makes, of one turn or many, with tools or
without; `tool_calls.py` says how these are shown and called. Nothing of it is changed: its own
methods make the state, answer, say when it is over, clean up and score. Only its loop is ours, as
another engine samples. The rubric is read after each turn, as any may be the last one. A rubric
that compares the answers of a group cannot be read.

All episodes share one event loop, as there: where one blocks it instead of awaiting, all wait, and
those that wait too long are lost with it. The rubric gives 0 where a reward function raises.
Version 0.4 has no environments of this kind any more.
"""

import functools
import importlib
import json
from typing import Any

from sdpo_jax.envs.adapters.foreign import Loop, Rewards, read_arguments
from sdpo_jax.envs.adapters.tool_calls import calls_in, described
from sdpo_jax.envs.imports import need
from sdpo_jax.records import Task, Turn


class Verifiers:
  """Plays one environment.

  world: its id.
  arguments: of its `load_environment`, as JSON.
  reward_range: (lowest, highest) reward of its rubric.
  """

  def __init__(
    self, *, world: str, arguments: str = "", reward_range: tuple[float, float] = (0.0, 1.0)
  ):
    need("sdpo_jax.envs.adapters.verifiers:Verifiers", "verifiers", ("verifiers",))
    package = importlib.import_module("verifiers")
    self.env = package.load_environment(world, **read_arguments(arguments))
    self._name, self.loop, self.rewards = world, Loop(), Rewards(reward_range)
    self._rows = functools.cache(self._find_rows)

  def task(self, split: str, index: int) -> Task:
    """Returns a row of the environment's data; after the last comes the first again."""
    rows = self._rows(split)
    number = index % len(rows)
    row = dict(rows[number])
    answer = row.get("answer")
    return Task(
      f"{self._name}/{split}/{number}",
      text_of(row["prompt"][-1]),
      solution=answer if isinstance(answer, str) and answer else None,
      split=split,
      data={"row": row},
    )

  def start(self, task: Task) -> "VerifiersEpisode":
    """Begins an episode of a row."""
    return VerifiersEpisode(self, task.data["row"])

  def close(self) -> None:
    """Ends the loop."""
    self.loop.close()

  def _find_rows(self, split: str):
    """Returns the rows of a split: "train", or any other for those to evaluate on."""
    rows = self.env.build_dataset() if split == "train" else self.env.build_eval_dataset()
    if rows is None:
      raise ValueError(f"{self._name} has no rows for {split!r}: set config.eval.splits='train'")
    return rows


class VerifiersEpisode:
  """One rollout of the environment, of which the policy's turns come from elsewhere."""

  def __init__(self, world: Verifiers, row: dict):
    self._env, self._loop, self._rewards, self._row = world.env, world.loop, world.rewards, row
    self._state: Any = None
    self._messages: list = []  # before the next turn
    self._is_clean = False

  def prompt(self) -> list[dict[str, str]]:
    """Begins the rollout."""
    self._loop.run(self._begin())
    messages = [{"role": m["role"], "content": text_of(m)} for m in self._messages]
    tools = self._state.get("tool_defs") or []
    if tools:
      about = [(f"{t['name']} {json.dumps(t['parameters'])}", t["description"]) for t in tools]
      messages[-1]["content"] = f"{described(about)}\n\n{messages[-1]['content']}"
    return messages

  def step(self, message: str) -> Turn:
    """Has the environment answer."""
    return self._loop.run(self._step(message))

  def close(self) -> None:
    """Cleans up, if that has not been done."""
    if self._state is not None and not self._is_clean:
      self._loop.run(self._env.cleanup(self._state))

  async def _begin(self) -> None:
    state = await self._env.init_state(self._row, _idle_client(), "policy")
    self._state = await self._env.setup_state(state) or state
    self._messages = list(await self._env.get_prompt_messages(self._state))

  async def _step(self, message: str) -> Turn:
    env, state = self._env, self._state
    said = _assistant(message)
    turn = {"prompt": self._messages, "completion": [said], "trajectory_id": state["trajectory_id"]}
    unknown = dict.fromkeys(("response", "tokens", "reward", "advantage"))
    await env.add_trajectory_step(state, turn | unknown | {"is_truncated": False, "extras": {}})
    seen: Any = ""
    is_over = await env.is_completed(state)
    if not is_over:
      messages = list(await env.get_prompt_messages(state))
      final = state.get("final_env_response")
      seen = messages[len(self._messages) + 1 :] if final is None else final
      is_over = final is not None and await env.is_completed(state)
      self._messages = messages
    if is_over:
      self._is_clean = True
      await env.cleanup(state)
    else:
      await env.render_completion(state)
    await env.rubric.score_rollout(state)
    text = seen if isinstance(seen, str) else "\n".join(map(text_of, seen))
    return Turn(text, self._rewards.mapped(state["reward"]), is_over)


def text_of(message) -> str:
  """Returns the text of a message, without its images."""
  content = message["content"] or ""
  if isinstance(content, str):
    return content
  return "\n".join(part["text"] for part in content if part["type"] == "text")


def _assistant(message: str):
  """Returns a message of the policy with its calls, as verifiers has them."""
  calls = [
    {"id": str(number), "name": name, "arguments": json.dumps(arguments)}
    for number, (name, arguments) in enumerate(calls_in(message))
  ]
  types = importlib.import_module("verifiers.types")
  return types.AssistantMessage(content=message, tool_calls=calls or None)


@functools.cache
def _idle_client():
  """Returns a client that nobody asks anything: a state must have one."""
  base = importlib.import_module("verifiers.clients").Client
  return type("IdleClient", (base,), dict.fromkeys(base.__abstractmethods__))(None)
