r"""Runs --mode=diagnose: says in minutes, and without training, what can learn here.

  python -m sdpo_jax.main --config=FILE --mode=diagnose --workdir=DIR

It samples groups of responses to questions for training, as a step would. It makes some of these
attempts again under other prompts (`again.py`): the question alone, what the teacher would read,
and what else could be shown. It reads some of them token by token (`tokens.py`). What it finds
(`measures.py`) goes through the rules of `verdict.py`.

config.diagnose.responses is the budget: a third is spent on groups, the rest on attempts that are
made again. The teacher's weights are the policy's, as at the beginning of a run. A method without a
teacher is diagnosed beside SDPO's teacher, as the method that it might be exchanged for. The
alternatives of a counterfactual method are not generated.

Files, in the directory diagnose/ of the work directory; a second start writes them anew:
  index.json             all figures, and the verdict
  index.html, tokens.png what a person reads; the page carries its picture inside
  config.json, run.json  settings and circumstances

Errors: SettingError for what cannot be diagnosed. RunError where no response could be judged.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax

from sdpo_jax import hosts
from sdpo_jax.config import refuse_episodes, validate
from sdpo_jax.data.tasks import RowEnv, TaskStream
from sdpo_jax.diagnose import measures, tokens
from sdpo_jax.diagnose.again import Again, choose, make_again
from sdpo_jax.diagnose.page import write_page
from sdpo_jax.diagnose.prompts import ABOUT, CONTROL, OWN, SDPO, PromptMaker
from sdpo_jax.diagnose.verdict import verdict
from sdpo_jax.engine.scoring import TextScorer
from sdpo_jax.errors import RunError, SettingError, blame_settings
from sdpo_jax.objectives import build
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Rollout, Sampling
from sdpo_jax.rollout import prompt_seed
from sdpo_jax.session import Session, open_session
from sdpo_jax.workdir import describe_run, write_atomically

SPLIT = "train"


@dataclasses.dataclass
class Samples:
  """What a diagnosis has sampled."""

  groups: list[list[Rollout]]
  prompts_QG: list[list[dict]]  # the prompts of each response
  made: list[Again]


def diagnose(c, workdir: str) -> dict:
  """Diagnoses a configuration, writes diagnose/ and returns what stands in its index.json."""
  directory = pathlib.Path(workdir) / "diagnose"
  with _opened(c) as (session, maker):
    samples = sample(c, session, maker)
    readings, answers = read_tokens(c, session, samples, maker)
    facts = {"sandbox_isolation": session.isolation, "conversations": maker.conversations}
    sizes = [leaf.size for leaf in jax.tree.leaves(session.params)]
  figures = figures_of(c, samples, maker) | {
    "tokens": tokens.figures(readings, answers),
    "parameters": int(sum(sizes)),
    "on_one_device": session.mesh is None,
    "has_teacher": build.build_method(c.method.to_dict()).needs_teacher,
  }
  found = figures | {"verdict": verdict(figures, c.method.to_dict()), "about": ABOUT}
  if hosts.leads():
    directory.mkdir(parents=True, exist_ok=True)
    describe_run(directory, c, facts)
    write_atomically(directory / "index.json", json.dumps(found, indent=2) + "\n")
    write_page(found, summary_lines(found), readings, samples.made, session.chat, directory)
  return found


def token_readings(c) -> list[tokens.Reading]:
  """Samples groups, and reads attempts as policy and as teacher; nothing is written.

  Of config.rollout.questions groups config.diagnose.texts attempts are read, failed ones first. The
  errors are those of `diagnose`, and SettingError where the model lies on several devices.
  """
  with _opened(c) as (session, maker):
    if session.mesh is not None:
      raise SettingError(
        f"a text is read on one device, and config.mesh lays the run over {session.mesh.size}: set "
        "config.mesh.fsdp=1"
      )
    groups, prompts_QG = sample_groups(c, session, maker, c.rollout.questions)
    readings, _ = read_tokens(c, session, Samples(groups, prompts_QG, []), maker)
  return readings


@contextlib.contextmanager
def _opened(c):
  """Yields (session, maker of prompts) of a configuration that is fit for this mode."""
  with blame_settings():
    check(c)
    method = build.build_method(teacher_row(c.method.to_dict()))
  notice = Notice("nothing is kept: the same command begins anew")
  splits = {SPLIT: "--mode=diagnose"}
  with (
    open_session(c, method=method, splits=splits, check_stop=notice.check) as session,
    notice,
  ):
    with blame_settings():
      maker = PromptMaker(
        session.chat, session.collector.env.prompt, method, c.data.max_teacher_tokens
      )
    yield session, maker


def check(c) -> None:
  """Raises ValueError for settings that this mode cannot run with."""
  validate(c)
  refuse_episodes(c, "--mode=diagnose")
  if c.method.teacher_weights.name == "remote":
    raise ValueError(
      "config.method.teacher_weights.name='remote' is not for --mode=diagnose, which samples from "
      "the teacher, and its teacher is the model itself: choose frozen"
    )
  least = 4 * c.rollout.group
  if c.diagnose.responses < least:
    raise ValueError(
      f"config.diagnose.responses={c.diagnose.responses} is too small for groups of "
      f"config.rollout.group={c.rollout.group}: at least {least}"
    )


def teacher_row(row: dict) -> dict:
  """Returns a method's row, or SDPO's if it has no teacher."""
  if build.build_method(row).needs_teacher:
    return row
  return build.method_row("sdpo")


def sample(c, session: Session, maker: PromptMaker) -> Samples:
  """Samples groups, and makes attempts again, within the budget."""
  questions = max(1, c.diagnose.responses // 3 // c.rollout.group)
  groups, prompts_QG = sample_groups(c, session, maker, questions)
  sampled = len(groups) * c.rollout.group
  chosen = choose(prompts_QG, c.diagnose.responses - sampled)
  say(f"{len(chosen)} attempts are made again, each under several prompts")
  made = make_again(
    session.collector,
    session.params,
    {(q, g): (groups[q][g], prompts_QG[q][g]) for q, g in chosen},
    sampling=_sampling(c, session),
    path=(c.seed, "diagnose again"),
  )
  return Samples(groups, prompts_QG, made)


def sample_groups(
  c, session: Session, maker: PromptMaker, questions: int
) -> tuple[list[list[Rollout]], list[list[dict]]]:
  """Samples a group for each of so many questions, or of all there are.

  Returns (groups, the prompts of each response). RunError where no response could be judged.
  """
  env, group = session.collector.env, c.rollout.group
  limit = env.size(SPLIT) if isinstance(env, RowEnv) else c.data.questions
  questions = min(questions, limit or questions)
  tasks = TaskStream(env, SPLIT, questions=c.data.questions, seed=c.seed).take(questions)
  say(f"{len(tasks)} questions, {group} responses each")
  groups = session.collector.collect(
    session.params,
    tasks,
    n=group,
    sampling=_sampling(c, session),
    seeds=[prompt_seed(c.seed, "diagnose", q) for q in range(len(tasks))],
  )
  if not any(r.is_judged for rollouts in groups for r in rollouts):
    raise RunError(
      f"none of {len(tasks) * group} responses could be judged; the log above says why"
    )
  return groups, [maker.of_group(rollouts) for rollouts in groups]


def _sampling(c, session: Session) -> Sampling:
  return Sampling(
    c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p, session.chat.stop_tokens
  )


def say(what: str) -> None:
  """Says on stderr what is done next; some of it takes minutes."""
  if hosts.leads():
    print(f"diagnose: {what}", file=sys.stderr)


def read_tokens(c, session: Session, samples: Samples, maker: PromptMaker):
  """Returns (readings, answers) of `tokens.read_attempts`; none on several devices."""
  if session.mesh is not None:  # a text is read by itself, and a mesh has no row of it
    return [], {}
  say(f"{c.diagnose.texts} attempts are read token by token")
  scorer = TextScorer(session.model)
  scorer.load(session.params)
  return tokens.read_attempts(
    tokens.TokenReader(scorer, session.chat, c.rollout.temperature),
    samples.groups,
    samples.prompts_QG,
    maker,
    c.diagnose.texts,
  )


def figures_of(c, samples: Samples, maker: PromptMaker) -> dict:
  """Returns the figures that need no weights."""
  has_entropy = c.rollout.top_p == 1.0 and c.rollout.temperature > 0
  return {
    "policy": measures.of_policy(samples.groups, maker.succeeded, is_uncut=has_entropy),
    "prompts": measures.of_prompts(samples.groups, samples.prompts_QG, maker.succeeded),
    "again": measures.of_again(samples.made, maker.succeeded, maker.chat),
  }


# ---- what is printed ----------------------------------------------------------------------------


def summary_lines(found: dict) -> list[str]:
  """Returns what is printed of a diagnosis; points are hundredths of the reward."""
  return [*_verdict_lines(found["verdict"]), *_policy_lines(found["policy"]), *_again_lines(found)]


def _policy_lines(policy: dict) -> list[str]:
  reward = f"reward {_percent(policy['reward'])}" if "reward" in policy else "no verdict"
  entropy = "" if policy["entropy"] is None else f", {policy['entropy']:.2f} nats a token"
  lines = [
    f"policy: {reward}, {policy['responses']} responses to {policy['questions']} questions"
    f"{entropy}, {policy['length_mean']:.0f} tokens, {policy['truncated']:.0%} cut off"
  ]
  if "mixed" in policy:
    lines.append(
      f"groups: {_percent(policy['mixed'])} hold better and worse responses, "
      f"{policy['solved']:.0%} a solution"
    )
  return lines


def _again_lines(found: dict) -> list[str]:
  failed, prompts = found["again"]["failed"], found["prompts"]
  if not failed:
    return ["no attempt failed: there is nothing to make again"]
  lines = [f"failed attempts, made again; shown  reward{'':14} against the question alone"]
  # of two equal prompts one is told; a method without a teacher has SDPO's as its own
  skipped = OWN if not found["has_teacher"] else ""
  if SDPO in failed and prompts[SDPO]["same_as_own"] == 1 and not skipped:
    skipped = SDPO
  for name, figure in failed.items():
    if name == skipped:
      continue
    line = f"  {ABOUT[name]:<34} {_percent(figure['reward']):<20}"
    if name != CONTROL:
      share = prompts[name]["share_of_failed"]
      line += f" {_points(figure['difference']):<20} possible for {share:.0%} of the failed"
    lines.append(line.rstrip())
  of_all = found["again"]["all"]
  for what, figure in (
    ("successes, own prompt", found["again"]["solved"]),
    ("all attempts, own prompt", of_all[OWN]),
    ("all attempts, SDPO's prompt", None if of_all[SDPO] == of_all[OWN] else of_all[SDPO]),
  ):
    if figure is not None:
      lines.append(f"  {what:<34} {_percent(figure['reward']):<20} {_points(figure['difference'])}")
  if not found["on_one_device"]:
    return [*lines, "token by token: not read, as the model lies on several devices"]
  return [*lines, *_token_lines(found["tokens"])]


def _token_lines(read: dict) -> list[str]:
  if read["gap"] is None:
    return []
  lines = [
    f"teacher and policy: {read['gap']:.2g} nats a token apart, with another likeliest token at "
    f"{read['top_differs']:.0%}"
  ]
  for name, right in read["right"].items():
    lines.append(
      f"  of a right answer, its likeliest token is the right one in {right['teacher']:.0%} (shown "
      f"{ABOUT[name]}), the policy's in {right['policy']:.0%}"
    )
  for name, right in read["followed"].items():
    lines.append(
      f"  along {name} attempts, the teacher's likeliest token is the right one in "
      f"{right['teacher']:.0%}, the policy's in {right['policy']:.0%}"
    )
    if "departure" in right:
      end = right["departure"]
      lines.append(
        f"  where they depart from it, in {end['teacher']:.0%} and {end['policy']:.0%} (the "
        "policy's is low by selection: it drew another token)"
      )
  if read["alike"] is not None:
    lines.append(
      f"  {read['alike']:.0%} of the gap is alike under another question's context: style"
    )
  return lines


def _verdict_lines(said: dict) -> list[str]:
  lines = [f"verdict on method={said['method']}: {said['outlook']}"]
  lines += [f"  {x['text']}  ({x['rule']}; {x['source']})" for x in said["reasons"]]
  if said["ranking"]:
    order = " > ".join(" = ".join(tied) for tied in said["ranking"])
    lines.append(f"  likely order: {order}")
  lines += [f"  change: {x['text']}  ({x['rule']}; {x['source']})" for x in said["advice"]]
  return lines


def _percent(interval: dict) -> str:
  text = f"{interval['mean']:.1%}"
  if interval["low"] is not None:
    text += f" [{interval['low']:.0%}, {interval['high']:.0%}]"
  return text


def _points(difference: dict) -> str:
  text = f"{100 * difference['mean']:+.1f}"
  if difference["low"] is not None:
    text += f" [{100 * difference['low']:+.0f}, {100 * difference['high']:+.0f}]"
  return text
