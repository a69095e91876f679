"""What an environment is, and the table of those that a configuration can name.

An environment is asked two things and knows nothing of models:

  prompt(task) -> [{"role": ..., "content": ...}, ...]   what the policy reads; the last message is the user's
  judge(task, response) -> Feedback                      reward in [0, 1], text for the teacher, status

`judge` is called from several threads at once. An exception, a reward that is not a number or no answer in time costs that one
response (ENV_FAILED), never the run. One that generates its tasks also has `task(split, index) -> Task` and `splits`.
Nothing here imports jax.
"""

from sdpo_jax.envs.tinycode import TinyCode

ENVS = {"tinycode": TinyCode}


def make_env(name: str, *, sandbox, **settings):
  """ValueError with the choices if there is no environment of that name or it has no such setting."""
  if name not in ENVS:
    raise ValueError(f"config.env.name={name!r} is unknown; choose from {sorted(ENVS)}")
  return ENVS[name](sandbox=sandbox, **settings)
