"""The engine of ALFWorld's games, for `engine_child.py`. Requests:

  ["load", number, game]     begins a game; `game` is a path, or what a game file holds
  ["step", number, command]  carries out one of its admissible commands
  ["close", number]          forgets it

The first two answer {"text", "commands", "won"}: what is seen, the admissible commands, and whether
the goal is reached. Several games may be open, by turns. The engine itself is not thread-safe.

It is run by its path, so it imports nothing of this package.
"""

import copy
import functools

CACHED_GAMES = 8  # parsed games that are kept: the episodes of a group play the same
CACHED_TEXTS = 4096  # parsed pieces of the grammar


def start():
  """Imports the engine and returns what answers a request."""
  from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
  import fast_downward
  from textworld import EnvInfos
  from textworld.envs.pddl import PddlEnv

  _keep_what_is_parsed()
  games = {}

  def state(found) -> dict:
    return {
      "text": found.feedback,
      "commands": list(found.admissible_commands),
      "won": bool(found.won),
    }

  def engine(request):
    action, number, *rest = request
    if action == "load":
      games[number] = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
      games[number].load(rest[0])
      return state(games[number].reset())
    if action == "step":
      return state(games[number].step(rest[0])[0])
    game = games.pop(number)
    # Each game has a copy of the planner's library.
    fast_downward.close_lib(game.unwrapped.downward_lib)
    return None

  return engine


def _keep_what_is_parsed() -> None:
  """Makes the engine parse each text once; the transcripts stay the same.

  It parses a game four times before the first step, and its whole wording at every step: 48 ms a
  step on one core become 15, half of a second a game becomes a third, and the next episode of the
  same game takes half of that.
  """
  import fast_downward
  from textworld.envs.pddl import textgen
  from textworld.logic import Rule

  fast_downward.pddl2sas = functools.lru_cache(2 * CACHED_GAMES)(fast_downward.pddl2sas)
  parse_query = functools.lru_cache(CACHED_TEXTS)(Rule.parse_conjunctive_query)
  Rule.parse_conjunctive_query = staticmethod(parse_query)
  parse_wording = functools.lru_cache(CACHED_TEXTS)(textgen._parse_and_convert)

  def copy_of_wording(*arguments, **settings):
    return copy.deepcopy(parse_wording(*arguments, **settings))  # it is written into

  textgen._parse_and_convert = copy_of_wording
