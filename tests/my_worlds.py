"""Worlds as they are written for other trainers; nothing here knows this project.

`Guess` is one for Gymnasium, `WordTools` a class for TRL's `environment_factory`, and `OpenEnv` the
protocol of an OpenEnv server.
"""

import json
import random
import threading

WORDS = ("apple", "bread", "chair", "dream")


class Guess:
  """Asks for one of four words, in three tries. Sums up to 1 at best, to -0.3 at worst."""

  def reset(self, *, seed):
    self.word = random.Random(seed).choice(WORDS)
    self.tries = 0
    return f"Guess my word: {', '.join(WORDS)}.", {}

  def step(self, action):
    self.tries += 1
    if action.strip() == self.word:
      return "Right.", 1.0, True, False, {}
    hint = f"No. It begins with {self.word[0]}."
    return hint, -0.1, False, self.tries == 3, {}


class WordTools:
  """Guesses with a tool. The object owns its reward."""

  def __init__(self):
    self.reward = 0.0

  def reset(self, secret, **kwargs) -> str:
    self.secret, self.guesses = secret, 0
    return f" It has {len(secret)} letters."

  def guess(self, word: str) -> str:
    """
    Guesses the word.

    Args:
      word: in small letters
    """
    self.guesses += 1
    if len(word) != len(self.secret):
      raise ValueError("wrong length")
    self.reward = float(word == self.secret)
    return "right" if self.reward else "wrong"

  async def first_letter(self) -> str:
    """Tells the first letter."""
    return self.secret[0]

  def get_reward(self) -> float:
    return self.reward

  def _hidden(self):
    raise AssertionError("no tool")


def few_guesses(completions, environments, secret, **kwargs):
  """A reward function as TRL calls it: from -1 to 1."""
  (environment,), (word,), (completion,) = environments, secret, completions
  assert environment.secret == word and completion[0]["role"] == "assistant"
  return [environment.reward - 0.25 * environment.guesses]


class OpenEnv:
  """A server of `Guess` that speaks OpenEnv's protocol, with so many sessions at a time."""

  def __init__(self, serve, *, sessions=1):
    self.sessions, self.opened, self.open = sessions, 0, 0
    self.lock = threading.Lock()
    self.server = serve(self.session, "127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{self.server.socket.getsockname()[1]}"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def session(self, socket):
    with self.lock:
      self.opened += 1
      is_full = self.open >= self.sessions
      self.open += not is_full
    if is_full:
      socket.send(json.dumps(error("CAPACITY_REACHED", "Server at capacity")))
      return
    try:
      self.play(socket)
    finally:
      with self.lock:
        self.open -= 1

  def play(self, socket):
    world = Guess()
    for line in socket:
      message = json.loads(line)
      if message["type"] == "close":
        return
      try:
        socket.send(json.dumps({"type": "observation", "data": answer(world, message)}))
      except KeyError as fault:
        socket.send(json.dumps(error("VALIDATION_ERROR", f"Invalid message: {fault}")))


def answer(world, message):
  if message["type"] == "reset":
    seen, _ = world.reset(seed=message["data"]["seed"])
    return {"observation": {"text": seen, "tries": 0}, "reward": None, "done": False}
  seen, reward, ended, cut, _ = world.step(message["data"]["message"])
  return {
    "observation": {"text": seen, "tries": world.tries},
    "reward": reward,
    "done": ended or cut,
  }


def error(code, message):
  return {"type": "error", "data": {"message": message, "code": code}}
