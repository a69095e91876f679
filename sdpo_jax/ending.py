"""Says how a run ends: whether it stops itself, and which of its checkpoints is best.

After each step `note` keeps two entries of the host's part of a checkpoint, so that a resumed run
decides alike, and every process of a run does:
  best   [step, value, metric] of the checkpoint with the highest value of config.checkpoint.best;
         None: no step with a checkpoint had one
  worse  evaluations in a row in which the first split of config.eval.splits was below the base
         model, on the same questions, beyond the interval (`gain` of evaluation/scores.py)

A run that has ended says so in run.json, under `ended`: `step`, `stopped` (whether it stopped
itself) and `best`, with `step`, `value` and `metric`.
"""

import json
import pathlib

from sdpo_jax.metrics import reduce
from sdpo_jax.workdir import about_run, write_atomically


def best_metric(c) -> str:
  """Returns the name of the metric by which a checkpoint is best; "" for none."""
  if c.checkpoint.best != "auto":
    return c.checkpoint.best
  return f"eval/{c.eval.splits[0]}/avg@k" if c.eval.splits else ""


def note(c, host: dict, i: int, metrics: dict, *, has_checkpoint: bool) -> None:
  """Notes in `host` what the metrics of step i say.

  Of equal values the first is best. Step 0 is the base model, which has no checkpoint.
  """
  values, metric = reduce(metrics), best_metric(c)
  if host["best"] is not None and host["best"][2:] != [metric]:
    host["best"] = None  # of a metric that the run no longer asks for
  value = values.get(metric)
  if i and has_checkpoint and value is not None:
    if host["best"] is None or value > host["best"][1]:
      host["best"] = [i, value, metric]
  gain = f"eval/{c.eval.splits[0]}/gain" if c.eval.splits else ""
  if gain in values:
    is_worse = values.get(f"{gain}_high", 0.0) < 0
    host["worse"] = host["worse"] + 1 if is_worse else 0


def has_stopped(c, host: dict) -> bool:
  """Tells whether a run with these entries stops itself; see config.train.stop_when_worse."""
  return 0 < c.train.stop_when_worse <= host["worse"]


def why_stopped(c, step: int) -> str:
  """Returns the sentence on a run that stopped itself."""
  return (
    f"stopped at step {step} of {c.total_steps}: eval/{c.eval.splits[0]}/avg@k was below the base "
    f"model beyond its interval at {c.train.stop_when_worse} evaluations in a row "
    f"(config.train.stop_when_worse)"
  )


def note_in_run_file(workdir: pathlib.Path, c, step: int, host: dict) -> None:
  """Writes into run.json, if there is one, how the run ended, unless it says so."""
  about = about_run(workdir)
  if not about:
    return
  best = host.get("best")
  ended = {
    "step": step,
    "stopped": has_stopped(c, host) and step < c.total_steps,
    "best": None if best is None else dict(zip(("step", "value", "metric"), best)),
  }
  if about.get("ended") != ended:
    write_atomically(workdir / "run.json", json.dumps(about | {"ended": ended}, indent=2) + "\n")


def of_run_file(workdir: pathlib.Path) -> dict:
  """Returns what run.json says about the end of a run; {} where it says nothing."""
  return about_run(workdir).get("ended", {})


def closing_lines(workdir: pathlib.Path, c, history: list[dict]) -> list[str]:
  """Returns the lines on the end of a run: why it stopped, which checkpoint is best.

  history: the lines of metrics.jsonl.
  """
  ended = of_run_file(workdir)
  lines = [("note", why_stopped(c, ended["step"]))] if ended.get("stopped") else []
  if ended.get("best"):
    lines += _lines_on_best(workdir, ended["step"], ended["best"], history)
  return [f"{head:>12}  {text}" for head, text in lines]


def _lines_on_best(
  workdir: pathlib.Path, last_step: int, best: dict, history: list[dict]
) -> list[tuple[str, str]]:
  """Returns (head, text) of each line about the best checkpoint of a run."""
  step, value, metric = best["step"], best["value"], best["metric"]
  of_step = {line["step"]: line for line in history}
  base, last = of_step.get(0, {}), of_step.get(last_step, {})
  lines = [("best", f"the last checkpoint, step {step}: {metric} {value:.3f}")]
  if step != last_step:
    lines = [
      (
        "best",
        f"step {step}: {metric} {value:.3f}; --mode=eval --checkpoint={workdir}:{step}, or "
        f"python -m sdpo_jax.export --workdir={workdir} --step={step} --out=DIR",
      )
    ]
  lowest = of_step.get(step, {}).get(f"{metric}_low", value)  # the best of several was lucky too
  if lowest > last.get(f"{metric}_high", lowest):
    low, now, high = (last[metric + end] for end in ("_low", "", "_high"))
    lines.append(
      (
        "note",
        f"the last checkpoint, step {last_step}, is below it beyond both intervals: "
        f"{now:.3f} [{low:.3f}, {high:.3f}]",
      )
    )
  if value <= base.get(metric, -1.0):
    lines.append(("note", f"no checkpoint is better than the base model: {base[metric]:.3f}"))
  return lines
