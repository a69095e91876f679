"""What each tracker is sent: settings, the metrics of each step, and a few rollouts.

A sink is made once a start of a run, with the id that the run has at the tracker, or None. It has

  id                            the run's id there, which the next start goes on with
  place                         one line that says where a person finds the run
  log(step, values, rollouts)   metrics of a step, and lines of its rollout file, or []
  close(ending)                 one of ENDINGS

and `address(workdir, project)`, which names the place that an id belongs to: under another address
the run is a new one. A sink may raise anything and may hang. Its package is imported only when it
is made, for both take seconds. How they are reached and whether they are offline is theirs to
decide, from WANDB_* and MLFLOW_* in the environment; without MLFLOW_TRACKING_URI, MLflow's files
are in the work directory.
"""

import json
import os
import pathlib
import secrets
import time
from typing import Any

ENDINGS = ("finished", "failed", "preempted")
# what is shown of a rollout, in this order; `teacher_context` is the prompt that the teacher reads
COLUMNS = ("task_id", "prompt", "teacher_context", "response", "reward", "feedback")


def folder(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the directory of the trackers' own files."""
  return workdir / "trackers"


def shown(line: dict) -> dict:
  """Returns what a tracker shows of a line of a rollout file."""
  return {name: line.get(name) for name in COLUMNS}


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
  """Returns {"section.key": value} of nested settings."""
  values: dict[str, Any] = {}
  for key, value in settings.items():
    if isinstance(value, dict):
      values |= flat(value, f"{prefix}{key}.")
    else:
      values[prefix + key] = value
  return values


class Wandb:
  """Weights & Biases. Without a network: WANDB_MODE=offline, and `wandb sync` later."""

  @staticmethod
  def address(workdir: pathlib.Path, project: str) -> str:
    """Returns the project."""
    return project

  def __init__(self, workdir: pathlib.Path, project: str, run_id: str | None, about: dict):
    """Begins the run, or goes on with it. about: {"config": settings, "run": facts}."""
    import wandb

    self._wandb = wandb
    self._run = wandb.init(
      project=project,
      name=workdir.name,
      id=run_id or secrets.token_hex(4),
      config=about["config"] | {"run": about["run"]},
      dir=folder(workdir),
      resume="allow",
      settings=wandb.Settings(console="off", silent=True),
    )
    self._run.config.update(about["config"], allow_val_change=True)
    self.id = self._run.id
    if self._run.offline:
      self.place = f"offline; `wandb sync {pathlib.Path(self._run.dir).parent}` sends it"
    else:
      self.place = self._run.url

  def log(self, step: int, values: dict[str, float], rollouts: list[dict]) -> None:
    """Logs all of a step in one call: a later one for the same step would be dropped."""
    entries: dict[str, Any] = dict(values)
    if rollouts:
      rows = [list(shown(line).values()) for line in rollouts]
      entries["rollouts"] = self._wandb.Table(columns=list(COLUMNS), data=rows)
    self._run.log(entries, step=step, commit=True)

  def close(self, ending: str) -> None:
    """Uploads what is left and ends the run."""
    if ending == "preempted":
      self._run.mark_preempting()
    self._run.finish(exit_code=int(ending != "finished"))


class Mlflow:
  """MLflow. Each setting is a parameter, and rollouts are artifacts, one file a step."""

  _STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
  _MOST_PARAMS = 100  # of one call

  @staticmethod
  def _store(workdir: pathlib.Path) -> str:
    files = (folder(workdir) / "mlflow").resolve().as_uri()
    return os.environ.get("MLFLOW_TRACKING_URI") or files

  @classmethod
  def address(cls, workdir: pathlib.Path, project: str) -> str:
    """Returns store and experiment; files move with their work directory."""
    return f"{os.environ.get('MLFLOW_TRACKING_URI', '')} {project}"

  def __init__(self, workdir: pathlib.Path, project: str, run_id: str | None, about: dict):
    """Begins the run, or goes on with it. about: {"config": settings, "run": facts}."""
    store = self._store(workdir)
    if store.startswith("file:"):
      os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow
    from mlflow import entities

    self._metric = entities.Metric
    mlflow.set_tracking_uri(store)
    self._client = mlflow.MlflowClient(store)
    if run_id is None:
      experiment = mlflow.set_experiment(project).experiment_id
      self.id = self._client.create_run(experiment, run_name=workdir.name).info.run_id
      self._log_settings(about["config"], entities.Param)
    else:
      self.id = run_id
      self._client.update_run(run_id, status="RUNNING")
    # a parameter keeps its first value; these files have the latest
    self._client.log_dict(self.id, about["config"], "config.json")
    self._client.log_dict(self.id, about["run"], "run.json")
    self.place = f"{store}, experiment {project!r}, run {self.id}"

  def _log_settings(self, settings: dict, param) -> None:
    params = [param(key, str(value)) for key, value in flat(settings).items()]
    for x in range(0, len(params), self._MOST_PARAMS):
      self._client.log_batch(self.id, params=params[x : x + self._MOST_PARAMS])

  def log(self, step: int, values: dict[str, float], rollouts: list[dict]) -> None:
    """Logs the metrics of a step; MLflow takes no `@` in their names."""
    now = int(time.time() * 1000)
    metrics = [
      self._metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()
    ]
    self._client.log_batch(self.id, metrics=metrics)
    if rollouts:
      text = json.dumps([shown(line) for line in rollouts], indent=2, ensure_ascii=False)
      self._client.log_text(self.id, text, f"rollouts/step_{step:06d}.json")

  def close(self, ending: str) -> None:
    """Sets the run's status."""
    self._client.set_terminated(self.id, self._STATUS[ending])


SINKS = {"wandb": Wandb, "mlflow": Mlflow}
