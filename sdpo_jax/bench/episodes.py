"""Measures how many episodes a second are played, and how long sampling waits for worlds.

  python -m sdpo_jax.bench episodes [--config=configs/agentic.py] [--batches=12] [--delays_ms=0,30]
                                    [--json=FILE]

Generation batches of the configuration are played, nothing is trained. Each is played with
config.rollout.overlap and without it, in turns, so that what else the machine does meets both
alike; the first of each is left out, since it compiles. A delay makes every answer of a world so
much slower: it stands for a world at the other end of a network. One row for each delay and kind:

  episodes_per_s  of wall time; what one core does is told by `taskset -c 0` before the command
  cpu_s           processor seconds a batch, all threads of this process
  turns           mean of an episode
  waiting         share of the time in which nothing could be sampled until some world answered
  hidden          share in which some world was at work while other episodes were sampled

Medians over the batches.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time

from sdpo_jax.bench.child import table
from sdpo_jax.errors import SettingError, local_path

COLUMNS = ("delay_ms", "overlap", "episodes_per_s", "cpu_s", "turns", "waiting", "hidden")


class Delayed:
  """An environment of episodes each of whose answers comes later."""

  def __init__(self, env, delay_s: float):
    self._env, self._delay_s = env, delay_s

  def __getattr__(self, name):
    return getattr(self._env, name)

  def start(self, task):
    return _DelayedEpisode(self._env.start(task), self._delay_s)


class _DelayedEpisode:
  def __init__(self, episode, delay_s: float):
    self._episode, self._delay_s = episode, delay_s

  def __getattr__(self, name):
    return getattr(self._episode, name)

  def step(self, message: str):
    time.sleep(self._delay_s)
    return self._episode.step(message)


def main(argv) -> int:
  """Measures and prints a table; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sdpo_jax.bench episodes",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--config", default="configs/agentic.py")
  parser.add_argument("--batches", type=int, default=12, help="of each kind, after a first one")
  parser.add_argument("--delays_ms", default="0,30", help="in milliseconds, between commas")
  parser.add_argument("--json", metavar="FILE", type=local_path, help="also write the rows there")
  args = parser.parse_args(argv)
  if args.batches < 1:
    parser.error(f"--batches={args.batches} must be at least 1")
  try:
    delays_s = [float(x) / 1e3 for x in args.delays_ms.split(",")]
  except ValueError:
    delays_s = [-1.0]
  if min(delays_s) < 0:
    parser.error(f"--delays_ms={args.delays_ms} are not numbers of at least 0 between commas")
  try:
    rows = [row for delay_s in delays_s for row in measure(args.config, args.batches, delay_s)]
  except SettingError as error:
    print(f"sdpo_jax.bench: {error}", file=sys.stderr)
    return 2
  print(table(COLUMNS, rows, error_in="delay_ms"))
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)
      file.write("\n")
  return 0


def measure(path: str, batches: int, delay_s: float) -> list[dict]:
  """Returns a row without overlap and one with it. SettingError for what plays no episodes."""
  from sdpo_jax import config
  from sdpo_jax.bench.timing import machine
  from sdpo_jax.envs.base import find_env, plays
  from sdpo_jax.errors import blame_settings
  from sdpo_jax.session import open_session

  players = []
  with contextlib.ExitStack() as stack:
    for overlap in (False, True):
      with blame_settings():
        c = config.load(path)
        c.rollout.overlap = overlap
        config.validate(c)
        if not plays(find_env(c.env.name)):
          raise SettingError(f"--config={path}: config.env.name={c.env.name!r} plays no episodes")
      session = stack.enter_context(open_session(c, splits={"train": "the measurement"}))
      players.append(_Batches(c, session, delay_s))
    for i in range(batches + 1):
      for player in players:
        player.play(i)
  settings = dict(config=path, batches=batches, delay_ms=1e3 * delay_s, machine=machine())
  return [settings | player.row() for player in players]


class _Batches:
  """Plays generation batches in an open session; holds what it measured of each but the first."""

  def __init__(self, c, session, delay_s: float):
    self._c, self._session, self._measured = c, session, []
    player = session.collector
    if delay_s:
      player.env = Delayed(player.env, delay_s)

  def play(self, i: int) -> None:
    """Plays batch i, whose questions and seeds are those of step i + 1 of a run."""
    from sdpo_jax.records import Sampling
    from sdpo_jax.rollout import prompt_seed

    c, session = self._c, self._session
    rollout = c.rollout
    count = rollout.questions
    tasks = [session.collector.env.task("train", i * count + q) for q in range(count)]
    stops = session.chat.stop_tokens
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, stops)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    groups = session.collector.collect(
      session.params,
      tasks,
      n=rollout.group,
      sampling=sampling,
      seeds=[prompt_seed(c.seed, "train", i + 1, q) for q in range(count)],
    )
    wall_s = time.perf_counter() - wall_start
    times = session.collector.take_times()
    episodes = [episode for group in groups for episode in group]
    figures = dict(
      episodes_per_s=len(episodes) / wall_s,
      cpu_s=time.process_time() - cpu_start,
      turns=sum(len(episode.turns) for episode in episodes) / len(episodes),
      waiting=times["time/worlds_wait_s"] / wall_s,
      hidden=times["time/worlds_hidden_s"] / wall_s,
    )
    if i:
      self._measured.append(figures)

  def row(self) -> dict:
    """Returns the medians."""
    medians = {
      name: statistics.median(figures[name] for figures in self._measured)
      for name in self._measured[0]
    }
    return dict(overlap=bool(self._c.rollout.overlap)) | medians
