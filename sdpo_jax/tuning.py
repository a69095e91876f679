"""Chooses the settings of each arm of an experiment on the split `tune`, before its grid runs.

An experiment file (see experiment.py) may have, beside get_grid,

  get_tuning()       returns {arm: {trial: arguments of sdpo_jax.main}}
  get_grid(chosen)   takes {arm: the arguments of its chosen trial}, and returns the grid

A trial of several seeds is a list of such arguments, one for each seed; get_grid takes its first
one's. A run of the grid belongs to an arm if its name is the arm's, or that and "_...".

The choice is the trial with the highest last eval/tune/avg@k, averaged over its seeds; of equal
ones it is the first. tuning.json records all of it:

  metric, rule   what is compared, and how the choice is made
  arms           {arm: {"chosen": trial, "trials": {trial: ...}}}; of a trial, its arguments and
                 seeds, the score of each seed, and their mean with its 95 % interval (low, high):
                 over seeds, or over questions where there is one seed

Everything that would make a choice unfair, or a reported number a chosen one, is a ValueError
before anything runs (`check`).
"""

import functools
import pathlib
from typing import Iterator, NamedTuple

import ml_collections

from sdpo_jax import config, metrics, report, stats
from sdpo_jax.envs import composed
from sdpo_jax.errors import RunError

Arguments = list[str]  # of sdpo_jax.main
Tuning = dict[str, dict[str, list[Arguments]]]  # arm -> trial -> one run for each seed
Grid = dict[str, Arguments]  # run name -> its arguments

SPLIT = "tune"
METRIC = f"eval/{SPLIT}/avg@k"
RULE = "the highest mean over seeds of the last evaluation; of equal ones the first"
# Settings in which the trials of an arm may differ without being tuned
NOT_TUNED = ("seed", "label")
# Environments whose split tune leaves out the first HELDOUT_ASKED questions of heldout
COMPOSED = ("tinycode", "arithmetic")


class Trial(NamedTuple):
  """One trial of an arm."""

  arm: str
  name: str
  arguments: list[Arguments]  # of each of its runs

  def runs(self) -> Grid:
    """Returns its runs by name, which is their directory too."""
    name = f"tuning/{self.arm}/{self.name}"
    if len(self.arguments) == 1:
      return {name: self.arguments[0]}
    return {f"{name}/run{i}": arguments for i, arguments in enumerate(self.arguments)}


def read(value) -> Tuning:
  """Returns what get_tuning() returns, with a list of runs for every trial."""
  is_tuning = isinstance(value, dict) and all(
    isinstance(trials, dict) and trials and all(map(_is_trial, trials.values()))
    for trials in value.values()
  )
  if not is_tuning or not value:
    raise ValueError(
      "get_tuning() returns no dict of arms, each a dict of trials and lists of arguments"
    )
  return {
    arm: {name: _runs_of(given) for name, given in trials.items()} for arm, trials in value.items()
  }


def _is_trial(given) -> bool:
  """Tells whether a trial is a list of arguments, or a list of such lists."""
  return _is_arguments(given) or (
    isinstance(given, (list, tuple)) and bool(given) and all(map(_is_arguments, given))
  )


def _is_arguments(given) -> bool:
  return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(x, str) for x in given)


def _runs_of(given) -> list[Arguments]:
  """Returns the arguments of each run of a trial."""
  each = [given] if given and isinstance(given[0], str) else given
  return [list(arguments) for arguments in each]


def trials_of(tuning: Tuning) -> Iterator[Trial]:
  """Yields every trial."""
  for arm, trials in tuning.items():
    for name, arguments in trials.items():
      yield Trial(arm, name, arguments)


def runs(tuning: Tuning) -> Grid:
  """Returns the runs of all trials."""
  return {
    name: arguments for trial in trials_of(tuning) for name, arguments in trial.runs().items()
  }


def choices(tuning: Tuning) -> Iterator[dict[str, str]]:
  """Yields {arm: trial}: the first trial of each arm, then the second of each, and so on."""
  for names in zip(*tuning.values()):
    yield dict(zip(tuning, names, strict=True))


def arguments_of(tuning: Tuning, choice: dict[str, str]) -> dict[str, Arguments]:
  """Returns what get_grid takes for a choice {arm: trial}."""
  return {arm: tuning[arm][name][0] for arm, name in choice.items()}


def arm_of(run: str, arms) -> str | None:
  """Returns the arm that a run of the grid belongs to: of several, the longest name."""
  return max((arm for arm in arms if f"{run}_".startswith(f"{arm}_")), key=len, default=None)


# What a tuning must not be


def check_trials(tuning: Tuning) -> None:
  """Raises ValueError for arms with unequal chances, or a trial that sees another split."""
  counts = {arm: len(trials) for arm, trials in tuning.items()}
  if len(set(counts.values())) > 1:
    listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
    raise ValueError(f"get_tuning(): arms have different numbers of trials: {listed}")
  if len({len(trial.arguments) for trial in trials_of(tuning)}) > 1:
    listed = ", ".join(f"{t.arm}/{t.name} {len(t.arguments)}" for t in trials_of(tuning))
    raise ValueError(f"get_tuning(): trials have different numbers of runs: {listed}")
  for trial in trials_of(tuning):
    _check_differ_in_seed(trial)
  for name, arguments in runs(tuning).items():
    splits = _splits(settings(name, arguments))
    if splits != {SPLIT}:
      raise ValueError(
        f"{name}: a trial is evaluated on the split {SPLIT!r} alone, not on {sorted(splits)}: "
        "set config.eval.splits and config.eval.final_splits"
      )


def _check_differ_in_seed(trial: Trial) -> None:
  """Raises ValueError for runs of a trial that have one seed, or other settings."""
  flats = [_flat(name, arguments) for name, arguments in trial.runs().items()]
  seeds = {flat["seed"] for flat in flats}
  same = [{key: x for key, x in flat.items() if key not in NOT_TUNED} for flat in flats]
  if len(seeds) < len(flats) or any(flat != same[0] for flat in same):
    raise ValueError(f"tuning/{trial.arm}/{trial.name}: its runs must differ in the seed alone")


def check_grid(tuning: Tuning, choice: dict[str, str], grid: Grid) -> None:
  """Raises ValueError for a grid that reports what was tuned on, or does not use the choice."""
  tuning_seeds = {settings(name, arguments).seed for name, arguments in runs(tuning).items()}
  for name, arguments in grid.items():
    c = settings(name, arguments)
    if SPLIT in _splits(c):
      raise ValueError(f"{name}: a reported run is not evaluated on the split {SPLIT!r}")
    if c.seed in tuning_seeds:
      raise ValueError(f"{name}: its seed {c.seed} is the seed of a trial too")
    is_composed = c.env.name in COMPOSED and "heldout" in _splits(c)
    if is_composed and c.eval.questions > composed.HELDOUT_ASKED:
      raise ValueError(
        f"{name}: config.eval.questions={c.eval.questions}, but the split {SPLIT!r} leaves out "
        f"the first {composed.HELDOUT_ASKED} questions of heldout only"
      )
    arm = arm_of(name, tuning)
    if arm is not None:
      _check_uses_choice(name, c, tuning[arm], choice[arm])
  for arm in tuning:
    if all(arm_of(name, tuning) != arm for name in grid):
      raise ValueError(f"get_grid(): no run is named {arm}, or {arm}_...: its tuning is not used")


def _splits(c) -> set[str]:
  return {*c.eval.splits, *c.eval.final_splits}


def _check_uses_choice(name: str, c, trials: dict[str, list[Arguments]], chosen: str) -> None:
  """Raises ValueError for a run without the chosen value of a setting that the trials vary."""
  flat_of = {trial: _flat(trial, arguments[0]) for trial, arguments in trials.items()}
  own = report.flattened(c.to_dict())
  keys = {key for flat in flat_of.values() for key in flat} - set(NOT_TUNED)
  for key in sorted(keys):
    tried = [flat.get(key) for flat in flat_of.values()]
    wanted = flat_of[chosen].get(key)
    if any(value != wanted for value in tried) and own.get(key) != wanted:
      raise ValueError(
        f"{name}: config.{key} is {own.get(key)!r}, but {wanted!r} in the chosen trial {chosen}"
      )


def _flat(name: str, arguments: Arguments) -> dict:
  return report.flattened(settings(name, arguments).to_dict())


def settings(name: str, arguments: Arguments) -> ml_collections.ConfigDict:
  """Returns the settings of a run as sdpo_jax.main reads them; ValueError if it would refuse."""
  try:
    return _settings(tuple(arguments))
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


@functools.cache  # reading takes 30 ms, and every choice meets the same runs
def _settings(arguments: tuple[str, ...]) -> ml_collections.ConfigDict:
  files = [x.partition("=")[2] for x in arguments if x.startswith("--config=")]
  overrides = ["", *(x for x in arguments if x.startswith(("--config.", "--noconfig.")))]
  if not files:
    raise ValueError("its arguments have no --config=FILE")
  c = config.load(files[-1])
  config.complete_parts(c, overrides)
  c = config.with_overrides(c, overrides)
  config.validate(c)
  return c


# The choice


def choose(tuning: Tuning, ends: dict[str, dict]) -> dict:
  """Returns the contents of tuning.json, from the last evaluation of each trial's run by name."""
  arms = {}
  for arm, trials in tuning.items():
    scored = {name: _score(Trial(arm, name, given), ends) for name, given in trials.items()}
    best = max(scored, key=lambda name: scored[name]["mean"])
    arms[arm] = {"chosen": best, "trials": scored}
  return {"metric": METRIC, "rule": RULE, "arms": arms}


def _score(trial: Trial, ends: dict[str, dict]) -> dict:
  """Returns what tuning.json has of a trial."""
  own = [ends[name] for name in trial.runs()]
  scores = [end[METRIC] for end in own]
  mean, low, high = stats.mean_interval(scores)
  if len(own) == 1:
    low, high = own[0].get(f"{METRIC}_low"), own[0].get(f"{METRIC}_high")
  seeds = [settings(name, arguments).seed for name, arguments in trial.runs().items()]
  return {
    "arguments": trial.arguments,
    "seeds": seeds,
    "scores": scores,
    "mean": mean,
    "low": low,
    "high": high,
  }


def last_evaluation(workdir: pathlib.Path) -> dict:
  """Returns the last score of a trial's run, with its interval; RunError if it has none."""
  lines = [line for line in metrics.read(workdir) if METRIC in line]
  if not lines:
    raise RunError(f"{workdir}: no response was judged, so it has no {METRIC}")
  return {key: value for key, value in lines[-1].items() if key.startswith(METRIC)}


def choice_of(record: dict) -> dict[str, str]:
  """Returns {arm: its chosen trial} of the contents of tuning.json."""
  return {arm: entry["chosen"] for arm, entry in record["arms"].items()}


def check_same_trials(tuning: Tuning, record: dict) -> None:
  """Raises ValueError if the contents of tuning.json are of other trials."""
  recorded = {
    arm: {name: trial["arguments"] for name, trial in entry["trials"].items()}
    for arm, entry in record["arms"].items()
  }
  if recorded != tuning:
    raise ValueError("tuning.json is of other trials than get_tuning() returns")


def of_run(run: str, record: dict | None) -> dict | None:
  """Returns how a run's arm was tuned: how many trials, and the choice; None: it was not."""
  arm = None if record is None else arm_of(run, record["arms"])
  if arm is None:
    return None
  entry = record["arms"][arm]
  return {"trials": len(entry["trials"]), "chosen": entry["chosen"]}
