r"""Test-time self-distillation: one hard question, binary reward, no solution known; keep attempting and learn between attempts.

Source: arXiv 2601.20802, section 5. Arms, all with the same sampler, judge and accounting:
  sdpo        batches of `rollouts` attempts from fresh weights; each batch without a success is one update on its feedback alone
  best_of_k   independent attempts of the base model
  multi_turn  one attempt after another; the prompt holds the feedback on the earlier ones, the oldest dropped first at the limit

A run is one (arm, question, seed). It stops at its first success or at the budget; a run that is not solved by then counts as not
found at every k (the paper's convention; `stats.discovery_at_k`). best_of_k spends its whole budget, so that discovery@k is the unbiased
estimator pass@k with n = budget.

A run is a pure function of (weights, settings, question, seed) and starts from the base weights, so nothing leaks between questions. Each
finished run is one line of WORKDIR/discover.jsonl; a killed session repeats the run that it was in, to the same end.
"""

import json
import pathlib
import time
from typing import Any, Callable

import jax
import numpy as np

from sdpo_jax import stats
from sdpo_jax.data.batch import Shape, pack
from sdpo_jax.data.tasks import first_tasks
from sdpo_jax.objectives import methods
from sdpo_jax.objectives.loss import make_objective
from sdpo_jax.objectives.teacher_context import Context
from sdpo_jax.records import Sampling, Status, Task
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.train_step import init_state, make_optimizer, make_signals, make_train_step
from sdpo_jax.wiring import blame_settings, describe_run, same_run, wired, write_atomically

ARMS = ("sdpo", "best_of_k", "multi_turn")


class Budget:
  """Attempts, generated tokens and teacher tokens of one run."""

  def __init__(self, attempts: int):
    self.limit, self.attempts, self.tokens, self.teacher_tokens, self.first_success = attempts, 0, 0, 0, None

  def count(self, rollouts) -> None:
    for r in rollouts:
      self.attempts += 1
      self.tokens += len(r.tokens)
      if self.first_success is None and r.feedback.status is not Status.ENV_FAILED and r.feedback.reward >= 1.0:
        self.first_success = self.attempts

  @property
  def spent(self) -> bool:
    return self.attempts >= self.limit

  def record(self) -> dict[str, Any]:
    return {"first_success": self.first_success, "attempts": self.attempts, "tokens": self.tokens, "teacher_tokens": self.teacher_tokens}


def solve_by_learning(task: Task, budget: Budget, *, fresh: Callable, collect: Callable, make_batch: Callable, step: Callable) -> None:
  """SDPO on one question from fresh weights, until a success or the budget's end."""
  state = fresh()
  while budget.first_success is None and not budget.spent:
    groups = collect(state.params, task, budget.attempts)
    budget.count(groups[0])
    if budget.first_success is None and not budget.spent:
      packed = make_batch(groups)
      budget.teacher_tokens += int((packed.batch.teacher.segment_CPT > 0).sum())
      state, _ = step(state, packed.batch)


def solve_by_sampling(task: Task, budget: Budget, *, params, collect: Callable) -> dict[str, int]:
  """All of the budget, independent; returns how many attempts succeeded."""
  successes = 0
  while not budget.spent:
    group = collect(params, task, budget.attempts)[0]
    budget.count(group)
    successes += sum(r.feedback.reward >= 1.0 for r in group)
  return {"successes": successes}


def solve_by_turns(task: Task, budget: Budget, *, params, collect_one: Callable, fits: Callable) -> None:
  """Feedback on earlier attempts stays in the prompt, newest last; the oldest is dropped while the prompt does not fit."""
  history: list[str] = []
  while budget.first_success is None and not budget.spent:
    shown = list(history)
    while shown and not fits(prompt_with(task, shown)):
      shown.pop(0)
    rollout = collect_one(params, prompt_with(task, shown), budget.attempts)
    budget.count([rollout])
    if rollout.feedback.text:
      history.append(rollout.feedback.text)


def prompt_with(task: Task, feedbacks: list[str]) -> Task:
  """The task with the feedback on earlier attempts in its prompt, in the words that the teacher reads."""
  if not feedbacks:
    return task
  return Task(task.id, Context(feedback="\n\n".join(feedbacks)).render(task.prompt), task.system, task.solution, task.split, task.data)


def discover(c, workdir: str) -> dict[str, Any]:
  """Runs every (arm, question, seed) that is not done yet and returns the summary, also written to discover.json."""
  workdir = pathlib.Path(workdir)
  d = c.discover
  with blame_settings():
    for arm in d.arms:
      if arm not in ARMS:
        raise ValueError(f"config.discover.arms={arm!r} is unknown; choose from {list(ARMS)}")
    same_run(workdir, c, begun=(workdir / "discover.jsonl").exists())
  with wired(c) as w:
    describe_run(workdir, c, {"sandbox_isolation": w.isolation})
    method = c.method.to_dict()
    objective, parts, tx = make_objective(method), methods.build(method), make_optimizer(**c.optimizer)
    teacher = parts["teacher_weights"]()
    signals = make_signals(w.model, objective, mix=teacher.mix, temperature=c.rollout.temperature, remat=c.model.remat, join=w.join)
    step = jax.jit(make_train_step(signals, objective, tx, teacher_move=teacher.move), donate_argnums=0)

    params, frozen = w.trainable(c.seed)
    fresh = lambda: init_state(jax.tree.map(lambda x: x.copy(), params), tx, keep_teacher=teacher.keep)
    sampling = Sampling(c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, w.chat.stop_tokens)
    shapes: list[Shape] = []
    make_batch = lambda groups: pack(groups, chat=w.chat, messages=w.collector.env.prompt, teacher_context=parts["teacher_context"],
                                     advantage=parts["advantage"], max_teacher_tokens=c.data.max_teacher_tokens,
                                     length_multiple=c.data.length_multiple, response_multiple=c.data.response_multiple, shapes=shapes)
    lines = read_lines(workdir)
    done = {(line["arm"], line["task_id"], line["seed"]) for line in lines}
    with open(workdir / "discover.jsonl", "a", encoding="utf-8") as log:
      for seed in range(d.seeds):
        for task in first_tasks(w.collector.env, d.split, d.questions):
          for arm in d.arms:
            if (arm, task.id, seed) in done:
              continue
            begun, budget, extra = time.monotonic(), Budget(d.attempts), {}

            def collect(params, task, attempts, n=d.rollouts):
              seeds = [prompt_seed(c.seed, "discover", task.id, seed, attempts)]
              return w.collector.collect(params, [task], n=min(n, d.attempts - attempts), sampling=sampling, seeds=seeds)

            if arm == "sdpo":
              solve_by_learning(task, budget, fresh=fresh, collect=lambda params, *a: collect(w.weights(params, frozen), *a), make_batch=make_batch,
                                step=lambda *a: step(*a, frozen))
            elif arm == "best_of_k":
              extra = solve_by_sampling(task, budget, params=w.params, collect=lambda *a: collect(*a, n=c.rollout.rows))
            else:
              solve_by_turns(task, budget, params=w.params, collect_one=lambda *a: collect(*a, n=1)[0][0],
                             fits=lambda t: len(w.chat.prompt_tokens(w.collector.env.prompt(t))) <= c.data.max_prompt_tokens)
            line = {"arm": arm, "task_id": task.id, "seed": seed} | budget.record() | extra | {"time_s": round(time.monotonic() - begun, 3)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            lines.append(line)
  summary = summarise(lines, d.attempts)
  write_atomically(workdir / "discover.json", json.dumps(summary, indent=2) + "\n")
  return summary


def read_lines(workdir: pathlib.Path) -> list[dict]:
  """Finished runs; a last line that a kill cut short is removed from the file, and its run is repeated."""
  path = workdir / "discover.jsonl"
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8")
  whole = text[:text.rfind("\n") + 1]
  if whole != text:
    write_atomically(path, whole)
  return [json.loads(line) for line in whole.splitlines()]


def summarise(lines: list[dict], budget: int, *, level: float = 0.9) -> dict[str, Any]:
  """discovery@k per arm at powers of two and at the budget, with bootstrapped intervals over questions, and what it cost."""
  ks = sorted({2**i for i in range(budget.bit_length()) if 2**i <= budget} | {budget})
  summary: dict[str, Any] = {"budget": budget, "level": level, "arms": {}}
  for arm in dict.fromkeys(line["arm"] for line in lines):
    mine = [line for line in lines if line["arm"] == arm]
    by_question: dict[str, list[dict]] = {}
    for line in mine:
      by_question.setdefault(line["task_id"], []).append(line)

    def at(k):
      if arm == "best_of_k":   # unbiased, from all attempts
        return [float(np.mean([stats.pass_at_k(line["attempts"], line["successes"], min(k, line["attempts"])) for line in runs])) for runs in by_question.values()]
      return [stats.discovery_at_k([line["first_success"] for line in runs], k) for runs in by_question.values()]

    summary["arms"][arm] = {
        "discovery": {str(k): stats.mean_interval(at(k), level=level)._asdict() for k in ks},
        "questions": len(by_question), "runs": len(mine), "solved": sum(line["first_success"] is not None for line in mine),
        "mean_attempts": float(np.mean([line["first_success"] or line["attempts"] for line in mine])),
        "mean_tokens": float(np.mean([line["tokens"] for line in mine])), "mean_teacher_tokens": float(np.mean([line["teacher_tokens"] for line in mine])),
        "time_s": float(np.sum([line["time_s"] for line in mine]))}
  return summary


def summary_lines(summary: dict[str, Any]) -> list[str]:
  """A table of discovery@k with intervals, one line an arm and k."""
  lines = []
  for arm, result in summary["arms"].items():
    lines.append(f"{arm}: {result['solved']} of {result['runs']} runs solved; on average {result['mean_attempts']:.0f} attempts, "
                 f"{result['mean_tokens']:.0f} tokens generated, {result['mean_teacher_tokens']:.0f} read by the teacher")
    lines += [f"  discovery@{k}: {x['mean']:.1%}" + (f" [{x['low']:.1%}, {x['high']:.1%}]" if x["low"] is not None else "") for k, x in result["discovery"].items()]
  return lines
