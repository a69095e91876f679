"""What an environment is, and the table of those that a configuration can name.

An environment is asked two things and knows nothing of models:

  prompt(task) -> [{"role": ..., "content": ...}, ...]   what the policy reads; the last message is the user's
  judge(task, response) -> Feedback                      reward in [0, 1], text for the teacher, status

`judge` is called from several threads at once. An exception, a reward that is not a number or no answer in time costs that one
response (ENV_FAILED), never the run. One that generates its tasks also has `task(split, index) -> Task`; one over a fixed data set has
`task_from_row(row, split) -> Task` instead (`rows.py`), and `data/tasks.py` gives it the rest. One that holds processes or files has `close()`; one
whose processes are slow to start has `start()`, called once before anything is judged. One that can tell what a response does has `behaviour(task,
response)`, anything hashable: equal answers are one and the same alternative to a failed attempt; without it, equal rewards and feedback are.
Nothing here imports jax.
"""

import importlib
import inspect

from sdpo_jax.envs.arithmetic import Arithmetic
from sdpo_jax.envs.coding import Coding
from sdpo_jax.envs.ifeval import IFEval
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.mcq import MCQ
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.envs.tool_use import ToolUse

ENVS = {
  "tinycode": TinyCode,
  "arithmetic": Arithmetic,
  "coding": Coding,
  "mcq": MCQ,
  "math_qa": MathQA,
  "tool_use": ToolUse,
  "ifeval": IFEval,
}


def make_env(name: str, *, sandbox, **settings):
  """The environment of that name in ENVS, or of your own as "module.path:ClassName"; it gets the sandbox if it has a parameter of that name.

  ValueError with the choices if there is no such environment or it has no such setting.
  """
  env, known = find_env(name), env_settings(name)
  for key in settings:
    if key not in known:
      raise ValueError(f"config.env.{key} is not a setting of {name}; choose from {sorted(known)}")
  for key, parameter in known.items():
    if parameter.default is parameter.empty and settings.get(key) is None:
      raise ValueError(f"config.env.{key} is not set, and {name} has no default for it")
  return env(
    **settings, **({"sandbox": sandbox} if "sandbox" in inspect.signature(env).parameters else {})
  )


def find_env(name: str):
  if name in ENVS:
    return ENVS[name]
  if ":" not in name:
    raise ValueError(
      f"config.env.name={name!r} is unknown; choose from {sorted(ENVS)} or name your own as 'module.path:ClassName'"
    )
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f"config.env.name={name!r} cannot be imported: {error}") from error
  if not callable(found):
    raise ValueError(f"config.env.name={name!r} is a {type(found).__name__}, not a class")
  return found


def env_settings(name: str) -> dict[str, inspect.Parameter]:
  """What a configuration can set of an environment: the arguments of its constructor, the sandbox aside."""
  return {
    key: p
    for key, p in inspect.signature(find_env(name)).parameters.items()
    if key != "sandbox" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
  }
