"""Plays an episode without a policy, as the player does."""

import json

from sdpo_jax import play


def turns_of(env, task, messages):
  """Plays an episode as the player does; returns its first text and its turns."""
  episode = env.start(task)
  try:
    first = episode.prompt()[-1]["content"]
    return first, [play.checked(episode.step(message)) for message in messages]
  finally:
    episode.close()


def call(name, **arguments):
  return json.dumps({"name": name, "arguments": arguments})
