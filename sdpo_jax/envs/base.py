"""An environment asks questions and judges responses; this file says what it has to provide.

An environment is a plain class without a base class. Texts go in and texts come out: it knows
nothing of models, tokens or arrays. No environment imports jax, so that one can also live in a
process that starts fast and dies alone. `tests/my_env.py` is a whole one in thirty lines.

An environment judges a response to a question, or plays an episode of many turns with the policy.
One that judges provides:

  prompt(task) -> [{"role": ..., "content": ...}, ...]
      The messages that the policy reads. The last one is the user's.
  judge(task, response) -> Feedback
      The reward in [0, 1]; a text that the teacher may read, "" when there is nothing to say; and a
      status: SCORED, or TIMEOUT where the response ran out of its own time. Several threads call
      it at once.

One that plays provides instead, and is called from several threads too:

  start(task) -> Episode
      The world of one episode, which is used once and by one thread at a time:
        prompt()       The messages before the first turn, as above.
        step(message)  Carries out what the policy wrote, of which the environment takes the part
                       that is an action, and returns a `records.Turn`: what is seen then, the
                       reward of the episode so far in [0, 1], whether it is over, and whether the
                       message held an action that the world allows.
        close()        Ends it, also in the middle. Called once, whatever happened before.
  at_once       An attribute, if so many episodes may be open at a time and no more.
  reads_thoughts
      An attribute, True where `step` gets the policy's whole message; else without its thoughts.

Both get their questions in one of two ways:

  task(split, index) -> Task
      For an environment that makes its questions: a pure function of the arguments and the
      settings, so that a resumed run sees the same questions.
  task_from_row(row, split) -> Task | None
      For an environment over a data set: reads one row of `config.data.sources`. None leaves the
      row out of the set. A ValueError names the field of a row that cannot be used; such a row
      stops the run, or is left out and counted, as `config.data.on_bad_row` says. `rows.py` has
      helpers for it; `data/tasks.py` reads the files, adds where a bad row stands, and gives the
      environment its `task(split, index)`.

It may provide:

  open()        Starts processes that are slow to start: called once, before anything is judged.
  close()       Ends its processes and closes its files: called once, when the run ends.
  behaviour(task, response)
                Tells what a response does, as anything hashable. Alternatives to a failed attempt
                count as one and the same where it is equal. Without it they do where reward and
                feedback are equal.
  answer(task, response)
                Tells the final answer of a response as a text, None where it has none in the form
                asked for. Evaluations write it down: equal answers are votes for the same one.
  solutions(task)
                Lists the right responses, as texts. The discover mode then reads a question's
                difficulty off their probabilities; without it, it has to sample.

A task may say two things about itself in `Task.data`, by which evaluations are told apart: its
`kind` (a text, such as a subject) and its `difficulty` (a text or a number). Two more are for a
teacher alone: a `hint`, and a `skill`, what is known of the world.

Failures. A response that is wrong, has the wrong form or runs out of its own time is no error:
`judge` returns reward 0 and says what is wrong. An exception of `judge`, a reward that is not a
number in [0, 1], or no answer within `config.rollout.judge_timeout_s` is the environment's own
failure. It costs that one response, never the run: the response gets the status ENV_FAILED, is
counted, and is never trained on. `judge` may also return that status itself. The same holds for
`start`, `prompt` and `step` of an episode, which ends there.

Settings. The arguments of the constructor, with their defaults, are the settings `config.env.KEY`;
they are declared nowhere else. An argument called `sandbox` is no setting: it receives the run's
`sandbox.Sandbox`, which runs programs that nobody trusts.

Your own. `config.env.name="package.module:Class"` names any class that can be imported, and
nothing in this package has to change. `adapters/` has classes that play what was written for other
trainers. To add one to the package, write one file in this folder, one line in ENVS, and its test.
"""

import inspect

from sdpo_jax import ranges
from sdpo_jax.envs.agents.alfworld import Alfworld
from sdpo_jax.envs.agents.household import Household
from sdpo_jax.envs.agents.search_qa import SearchQA, SearchQARows
from sdpo_jax.envs.agents.webshop import WebShop
from sdpo_jax.envs.arithmetic import Arithmetic
from sdpo_jax.envs.coding import Coding
from sdpo_jax.envs.ifeval import IFEval
from sdpo_jax.envs.imports import imported
from sdpo_jax.envs.instructions import Instructions
from sdpo_jax.envs.math_qa import MathQA
from sdpo_jax.envs.mcq import MCQ
from sdpo_jax.envs.pairwise import Pairwise
from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.envs.tool_use import ToolUse
from sdpo_jax.errors import did_you_mean, unknown

# What `config.env.name` can be, besides "module.path:ClassName".
ENVS = {
  "tinycode": TinyCode,
  "arithmetic": Arithmetic,
  "coding": Coding,
  "mcq": MCQ,
  "math_qa": MathQA,
  "tool_use": ToolUse,
  "ifeval": IFEval,
  "instructions": Instructions,
  "pairwise": Pairwise,
  # episodes
  "household": Household,
  "alfworld": Alfworld,
  "search_qa": SearchQA,
  "search_qa_rows": SearchQARows,
  "webshop": WebShop,
}


def make_env(name: str, *, sandbox, **settings):
  """Makes the environment that `name` names, with these settings.

  The environment gets the sandbox if its constructor has an argument of that name.
  ValueError with the choices for a name or a setting that does not exist, and for a setting
  that has no default and is not set.
  """
  env_class = find_env(name)
  parameters = env_settings(name)
  for key in settings:
    if key not in parameters:
      raise ValueError(
        f"config.env.{key} is not a setting of {name}"
        f"{did_you_mean(key, parameters, prefix='config.env.')}; choose from {sorted(parameters)}"
      )
  for key, parameter in parameters.items():
    if parameter.default is parameter.empty and settings.get(key) is None:
      raise ValueError(f"config.env.{key} is not set, and {name} has no default for it")
  check_env_numbers(name, settings)
  if "sandbox" in inspect.signature(env_class).parameters:
    settings["sandbox"] = sandbox
  env = env_class(**settings)
  _check_complete(name, env)
  return env


def _check_complete(name: str, env) -> None:
  """Raises ValueError for an environment that lacks what this file says it has to provide."""
  needed = [("task(split, index)", "task_from_row(row, split)")]
  if not plays(env):
    needed += [("prompt(task)",), ("judge(task, response)", "start(task)")]
  for choices in needed:
    if not any(hasattr(env, choice.partition("(")[0]) for choice in choices):
      raise ValueError(
        f"config.env.name={name!r}: {type(env).__name__} has no {' and no '.join(choices)}; "
        "sdpo_jax/envs/base.py says what an environment has to provide"
      )


def plays(env) -> bool:
  """Tells whether an environment, or its class, plays episodes instead of judging responses."""
  return hasattr(env, "start")


def check_env_numbers(name: str, settings: dict) -> None:
  """Raises ValueError for a number that the environment cannot work with.

  What the numbers of a class of one's own mean is its own affair, but they have to be finite.
  """
  env_class = find_env(name)
  known = next((key for key, entry in ENVS.items() if entry is env_class), None)
  for key, value in settings.items():
    if f"env.{known}.{key}" in ranges.RANGES:
      ranges.check(f"env.{known}.{key}", value, setting=f"config.env.{key}")
    else:
      ranges.check_finite(f"config.env.{key}", value)


def find_env(name: str):
  """Returns the class of that name in ENVS, or imports one named "module.path:ClassName".

  ValueError with the choices if there is none.
  """
  if name in ENVS:
    return ENVS[name]
  if ":" not in name:
    raise ValueError(
      f"{unknown('config.env.name', name, sorted(ENVS))} or name your own as "
      "'module.path:ClassName'"
    )
  env_class = imported("config.env.name", name)
  if not callable(env_class):
    raise ValueError(f"config.env.name={name!r} is a {type(env_class).__name__}, not a class")
  return env_class


def env_settings(name: str) -> dict[str, inspect.Parameter]:
  """Returns what a configuration can set of an environment: its constructor's arguments.

  The sandbox is not among them.
  """
  parameters = inspect.signature(find_env(name)).parameters
  return {
    key: parameter
    for key, parameter in parameters.items()
    if key != "sandbox"
    and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
  }
