"""Samples responses to fixed questions, has them judged, and keeps one line a question.

Questions and seeds depend on the split alone. Every evaluation of a run, and of runs that are
compared, therefore sees the same ones. A response depends on its own seed, and by rounding on what
is decoded with it. An evaluation of a checkpoint therefore goes over its questions in fixed
batches, as many as `rollout.rows` responses; one that was stopped samples a batch again of which
any line is missing. So it ends with the same files as one that was left alone, on the same devices.

`--mode=eval` writes into the work directory:
  eval/NAME/     the lines, and what they depend on (`files.py`)
  eval/NAME.json every figure (`scores.py`), computed from those lines alone

Errors: SettingError, one line, for settings, weights or questions that are not those of the lines
that are there. RunError where a batch of several questions has not one verdict: then the judge is
at fault, and nothing of that batch is written.
"""

from collections.abc import Callable
import contextlib
import json
import pathlib
from typing import Any, NamedTuple

from sdpo_jax import checkpoint, hosts
from sdpo_jax.config import model_of_run
from sdpo_jax.data.tasks import check_sources, first_tasks
from sdpo_jax.errors import RunError, SettingError, blame_settings
from sdpo_jax.evaluation.files import EvalFiles
from sdpo_jax.evaluation.fluency import NOTHING, Fluency
from sdpo_jax.evaluation.scores import headline, of_fluency
from sdpo_jax.evaluation.suites import Part, Suite, read_suites
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Rollout, Sampling, Status, Task
from sdpo_jax.rollout import Collector, prompt_seed
from sdpo_jax.session import Session, open_session, over_other_questions
from sdpo_jax.workdir import write_atomically


def evaluate(
  collector: Collector,
  params,
  settings,
  *,
  splits,
  sampling: Sampling,
  fluency: Fluency = NOTHING,
  keep: Callable[[str, list[dict]], None] = lambda split, lines: None,
) -> dict[str, float]:
  """Returns the headline metrics eval/<split>/... of `scores.py`, with k = settings.samples.

  settings: config.eval. keep: called with each split and its lines.
  """
  metrics = {}
  for split in splits:
    tasks = dict(enumerate(first_tasks(collector.env, split, settings.questions)))
    sampled = {"samples": settings.samples, "sampling": sampling, "fluency": fluency}
    lines = question_lines(collector, params, split, tasks, **sampled)
    metrics |= headline(f"eval/{split}", lines) | of_fluency(f"eval/{split}", lines)
    keep(split, lines)
  return metrics


def question_lines(
  collector: Collector,
  params,
  split: str,
  tasks: dict[int, Task],
  *,
  samples: int,
  sampling: Sampling,
  fluency: Fluency = NOTHING,
) -> list[dict]:
  """Returns a line (`scores.py`) of each question of a split, by its place there."""
  seeds = [prompt_seed(0, "eval", split, place) for place in tasks]
  groups = collector.collect(
    params, list(tasks.values()), n=samples, sampling=sampling, seeds=seeds
  )
  lines = [
    {
      "question": place,
      "id": task.id,
      "kind": _label(task.data.get("kind")),
      "difficulty": _label(task.data.get("difficulty")),
      "seed": seed,
      "responses": [_response(collector.env, rollout) for rollout in group],
    }
    for (place, task), seed, group in zip(tasks.items(), seeds, groups, strict=True)
  ]
  _add_fluency(lines, groups, fluency)
  return lines


def _add_fluency(lines: list[dict], groups: list[list[Rollout]], fluency: Fluency) -> None:
  """Adds to the lines what `fluency` asks for, as `scores.py` lists it."""
  if fluency.keeps_texts:
    for line, group in zip(lines, groups, strict=True):
      line["prompt"] = group[0].task.prompt
      for response, rollout in zip(line["responses"], group, strict=True):
        response["text"] = rollout.text
  if fluency.base is not None:
    means = iter(fluency.base.mean_logp([rollout for group in groups for rollout in group]))
    for line in lines:
      for response in line["responses"]:
        response["base_logp"] = next(means)


def _label(value):
  """Returns what a task says of itself, in a form that JSON has."""
  is_plain = value is None or (isinstance(value, (str, int, float)) and value == value)
  return value if is_plain else str(value)


def _response(env, rollout: Rollout) -> dict:
  length = len(rollout.tokens)
  response = {
    "reward": rollout.feedback.reward,
    "status": rollout.feedback.status.value,
    "length": length,
    "finish_reason": rollout.finish_reason,
    "mean_logp": sum(rollout.logp) / length if rollout.logp else None,
  }
  if hasattr(env, "answer"):
    response["answer"] = env.answer(rollout.task, rollout.text)
  return response


# ---- --mode=eval ---------------------------------------------------------------------------------


def evaluate_checkpoint(
  c, workdir: str, source: str, suites_file: str | None = None
) -> dict[str, float]:
  """Scores WORKDIR[:step] or a Hugging Face directory on the suites of a file.

  Without a file it takes the environment and the final splits of the configuration. Goes on where
  an earlier start was stopped. Writes eval/<name>.json into the work directory, and returns its
  metrics.
  """
  workdir = pathlib.Path(workdir)
  with blame_settings():
    model = find_model(source)
    if model.step is not None:
      # The run itself tells which model its checkpoint stands on, and with which adapters.
      c = c.copy_and_resolve_references()
      c.model.update(model_of_run(model.root))
    suites = read_suites(suites_file, c)
    files = EvalFiles(workdir / "eval" / model.name)
    for suite in suites:
      files.check_settings(suite)
      if suite.c.data.sources:
        _check_data(suite, suites_file)
  notice = Notice(
    f"the same command, with --workdir={workdir}, goes on with the questions that are missing"
  )
  path = None if model.step is not None else source
  if path is not None and suites[0].c.rollout.engine == "vllm":
    raise SettingError(
      f"--checkpoint={source} is not what vLLM serves: it takes adapters of its own model alone; "
      "use config.rollout.engine=local, or sglang"
    )
  first, *others = suites
  with (
    open_session(first.c, path, splits=first.splits, check_stop=notice.check) as session,
    contextlib.ExitStack() as stack,
  ):
    collectors = [session.collector] + [
      stack.enter_context(over_other_questions(suite.c, session, suite.splits, notice.check))
      for suite in others
    ]
    stack.enter_context(notice)
    with blame_settings():
      params = _weights(c, session, model)
      files.check_weights(checkpoint.checksums(params))
      fluencies = _fluencies(c, suites, session, model)
    for suite, collector, fluency in zip(suites, collectors, fluencies, strict=True):
      for part in suite.parts():
        _finish(part, suite, collector, params, files, fluency)
  metrics = files.metrics(part for suite in suites for part in suite.parts())
  if hosts.leads():
    about = {"checkpoint": source} | _about(suites)
    text = json.dumps(about | metrics, indent=2) + "\n"
    write_atomically(workdir / "eval" / f"{model.name}.json", text)
  return metrics


class FoundModel(NamedTuple):
  """What --checkpoint names."""

  root: str
  step: int | None  # None: a Hugging Face directory
  name: str


def find_model(source: str) -> FoundModel:
  """Returns the checkpoint or directory that WORKDIR[:step] or a path names.

  The step is a number or "best". ValueError where neither is there.
  """
  head, _, tail = source.rpartition(":")
  has_step = bool(head) and (tail == "best" or tail.isdigit())
  root = head if has_step else source
  latest = checkpoint.latest_step(root)
  if latest is not None:
    step = latest
    if has_step:
      step = checkpoint.best_step(root) if tail == "best" else int(tail)
    return FoundModel(root, step, f"step_{step:06d}")
  if not (pathlib.Path(source) / "config.json").exists():
    raise ValueError(
      f"--checkpoint={source}: neither a work directory with a checkpoint "
      "nor a Hugging Face directory"
    )
  return FoundModel(source, None, pathlib.Path(source).name)


def _weights(c, session: Session, model: FoundModel) -> Any:
  """Returns the weights as sampling wants them: the session's own, or those of the checkpoint."""
  if model.step is None:
    return session.params
  trainable, frozen = session.trainable(c.seed)
  return session.weights(checkpoint.restore_params(model.root, trainable, model.step), frozen)


def _check_data(suite: Suite, suites_file: str | None) -> None:
  """Raises FileNotFoundError, which names the suite, for a file that is missing."""
  try:
    check_sources(suite.c.data.sources, suite.splits)
  except FileNotFoundError as error:
    if suites_file is None:
      raise
    raise FileNotFoundError(
      f"--suites={suites_file}, suite {suite.name}: {error}; the first lines of "
      f"{suites_file.partition(':')[0]} say which data it reads and how to name or leave them out"
    ) from error


def _fluencies(c, suites: list[Suite], session: Session, model: FoundModel) -> list[Fluency]:
  """Returns what each suite notes of its answers as language; the base model is loaded once.

  `c` names it: the model of the run, or config.model.path where a directory is evaluated.
  """
  settings = c.copy_and_resolve_references()
  settings.eval.base_logp = any(suite.c.eval.base_logp for suite in suites)
  base = Fluency.of(settings, session, holds_base=model.step is not None).base
  return [
    Fluency(suite.c.eval.keep_texts, base if suite.c.eval.base_logp else None) for suite in suites
  ]


def _finish(
  part: Part,
  suite: Suite,
  collector: Collector,
  params,
  files: EvalFiles,
  fluency: Fluency = NOTHING,
) -> None:
  """Samples the questions of a part that have no line yet."""
  c = suite.c
  tasks = first_tasks(collector.env, part.split, c.eval.questions)
  with blame_settings():
    files.check_tasks(part, tasks)
  done = files.places_done(part)
  sampling = Sampling(
    c.rollout.max_new_tokens,
    part.temperature,
    part.top_p,
    collector.chat.stop_tokens,
    wants_logp=False,
  )
  size = max(1, c.rollout.rows // part.samples)
  for first in range(0, len(tasks), size):
    places = range(first, min(first + size, len(tasks)))
    if done.issuperset(places):
      continue
    batch = {place: tasks[place] for place in places}
    sampled = {"samples": part.samples, "sampling": sampling, "fluency": fluency}
    lines = question_lines(collector, params, part.split, batch, **sampled)
    _check_verdicts(part, lines)
    files.append(part, [line for line in lines if line["question"] not in done])


def _check_verdicts(part: Part, lines: list[dict]) -> None:
  """Raises RunError where no response to several questions has a verdict."""
  statuses = [r["status"] for line in lines for r in line["responses"]]
  if len(lines) > 1 and set(statuses) == {Status.ENV_FAILED.value}:
    raise RunError(
      f"{part.name}: none of {len(statuses)} responses to {len(lines)} questions could be judged; "
      "the log above says why. All questions before are kept, and the same command goes on"
    )


def _about(suites: list[Suite]) -> dict:
  """Returns how the questions were asked, for the head of eval/<name>.json."""
  keys = ("questions", "samples", "greedy", "temperature", "top_p")
  settings = {suite.name: {key: suite.c.eval[key] for key in keys} for suite in suites}
  return settings[""] if "" in settings else {"suites": settings}


def summary_lines(results: dict[str, float], base: dict[str, float]) -> list[str]:
  """Returns a line per split: avg@k with its interval, pass@k, and the lengths if they are there.

  The base model's stand beside them where they are known.
  """
  splits = {key: key.split("/")[1] for key in results if _is_headline(key)}
  width = max(12, *map(len, splits.values())) if splits else 0
  lines = []
  for key, split in splits.items():
    line = f"{split:>{width}}  {_figures(results, key)}"
    if key in base:
      line += f"   base model {_figures(base, key)}"
    lines.append(line)
  return lines


def _is_headline(key: str) -> bool:
  """Tells whether a metric is the mean reward of a whole split, not of a group of questions."""
  return key.endswith("/avg@k") and key.count("/") == 2


def _figures(metrics: dict[str, float], key: str) -> str:
  """avg@k with its interval and pass@k, as far as they are there."""
  text = f"avg@k {metrics[key]:.1%}"
  low, high = metrics.get(key + "_low"), metrics.get(key + "_high")
  if low is not None:
    text += f" [{low:.1%}, {high:.1%}]"
  pass_at_k = metrics.get(key.replace("avg@k", "pass@k"))
  if pass_at_k is not None:
    text += f" pass@k {pass_at_k:.1%}"
  length = metrics.get(key.replace("avg@k", "length_mean"))
  if length is not None:
    cut_off = metrics[key.replace("avg@k", "cut_off")]
    text += f" {length:.0f} tokens ({cut_off:.1%} cut off)"
  distinct_2 = metrics.get(key.replace("avg@k", "distinct_2"))
  if distinct_2 is not None:
    text += f" distinct-2 {distinct_2:.2f}"
  base_logp = metrics.get(key.replace("avg@k", "base_logp"))
  if base_logp is not None:
    text += f" base model's log-prob. {base_logp:.2f} nats a token"
  return text
