r"""Supervised pre-training of the tiny base models: the same train step, another loss.

  python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py[:domain=arithmetic][,start=HF_DIR] \
      --workdir=DIR [--out=HF_DIR]
  python -m sdpo_jax.pretrain --config=configs/pretrain_household.py --workdir=DIR [--out=HF_DIR]

Reads a synthetic corpus (data/corpus.py): statements to programs, with and without hindsight,
or whole episodes of the household (data/household_rows.py). Texts are packed into fixed rows with
segment ids. The batch of step i is a pure function of (seed, i), so a killed run resumes from its
checkpoint exactly. Training begins with random weights, or with those of `start`, a model of the
same vocabulary.

At the end it prints the accuracy on problems with novel words (greedy, exact behaviour): alone, and
given feedback, a solution or notes. Where the corpus has verdicts, it also prints the share that
the model imagines rightly. Of a model that acts it prints the success, alone and with a skill. It
writes a Hugging Face directory.

config.total_steps of a resumed run may be another, as far as config.optimizer.decay_steps allows.

Exit status: 0 success, 2 a wrong setting or a work directory begun with other ones, 1 a full disk.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time

from absl import flags
import jax
import numpy as np

from sdpo_jax import acting, checkpoint, metrics, ranges
from sdpo_jax.config import check_optimizer, check_schedule, load, model_location, with_overrides
from sdpo_jax.data import household_rows
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import (
  DOMAINS,
  VIEWS,
  Corpus,
  Mixture,
  Problem,
  Text,
  build_tokenizer,
)
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.errors import (
  Preempted,
  RunError,
  UsageError,
  blame_disk,
  local_path,
  unknown,
)
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig, Rope
from sdpo_jax.model.hf_weights import load_pretrained, save_pretrained
from sdpo_jax.objectives.advantage import zero
from sdpo_jax.objectives.build import Method
from sdpo_jax.objectives.surrogate import token_mean
from sdpo_jax.objectives.teacher_context import NoTeacher
from sdpo_jax.objectives.teacher_weights import TeacherWeights
from sdpo_jax.objectives.token_weight import uniform
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.preemption import Notice
from sdpo_jax.records import Request, Rows, Sampling, TrainBatch
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from sdpo_jax.workdir import check_same_run, finished, write_atomically

HOUSEHOLD = "household"  # the domain whose rows are episodes
# What metrics.jsonl holds of the step: its name there -> the step's.
LOGGED = {
  "train/grad_norm": "train/grad_norm",
  "train/loss": "train/loss",
  "train/nll": "train/loss_policy",
  "train/update_skipped": "train/update_skipped",
}


def supervised() -> Method:
  """Returns supervised training as a method: a surrogate alone, of which `nats` is the loss."""

  def nats(signals, batch, advantage_BR):
    return -signals.logp_BR

  return Method(
    teacher_context=NoTeacher(),
    teacher_weights=TeacherWeights(keep=False),
    token_signal=None,
    token_weight=uniform,
    advantage=zero,
    surrogate=nats,
    reduction=token_mean,
    notes=None,
    policy_share=1.0,
    divergence=None,
    reads=frozenset(),
  )


# ---- batches -------------------------------------------------------------------------------------


class Pack:
  """The arrays of one pack, filled text by text.

  Each of the B rows holds several texts in its T columns, and their response tokens, at most R.
  """

  def __init__(self, rows: int, length: int, responses: int, pad_token: int):
    self.token_BT = np.full((rows, length), pad_token, np.int32)
    self.segment_BT = np.zeros((rows, length), np.int32)
    self.position_BT = np.zeros((rows, length), np.int32)
    self.at_BR = np.zeros((rows, responses), np.int32)  # column that predicts response token r
    self.response_BR = np.zeros((rows, responses), np.int32)
    self.weight_BR = np.zeros((rows, responses), np.float32)
    self.texts_B = [0] * rows
    self.columns_B = [0] * rows  # used so far
    self.scored_B = [0] * rows  # response tokens so far

  def add(self, text: Text) -> bool:
    """Puts a text into the first row with room for it; False if there is none."""
    (B, T), R = self.token_BT.shape, self.weight_BR.shape[1]
    scored = np.flatnonzero(text.weights)
    for b in range(B):
      has_columns = self.columns_B[b] + len(text.tokens) <= T
      if has_columns and self.scored_B[b] + len(scored) <= R:
        self._put(b, text, scored)
        return True
    return False

  def _put(self, b: int, text: Text, scored: np.ndarray) -> None:
    """Puts a text behind those of a row. scored: indices of the tokens with weight."""
    first = self.columns_B[b]
    end = first + len(text.tokens)
    self.texts_B[b] += 1
    self.token_BT[b, first:end] = text.tokens
    self.segment_BT[b, first:end] = self.texts_B[b]
    self.position_BT[b, first:end] = np.arange(len(text.tokens))
    here = slice(self.scored_B[b], self.scored_B[b] + len(scored))
    self.at_BR[b, here] = first + scored - 1  # the column before predicts
    self.response_BR[b, here] = np.asarray(text.tokens)[scored]
    self.weight_BR[b, here] = np.asarray(text.weights)[scored]
    self.columns_B[b] = end
    self.scored_B[b] += len(scored)

  def batch(self) -> TrainBatch:
    """Returns all rows as one pack, without a teacher."""
    (B, T), R = self.token_BT.shape, self.weight_BR.shape[1]
    # a pack numbers its columns through, row after row
    at_BR = self.at_BR + T * np.arange(B, dtype=np.int32)[:, None]
    columns = (self.token_BT[None], self.segment_BT[None], self.position_BT[None])
    return TrainBatch(
      policy=Rows(*columns, None, at_BR.reshape(-1)[None]),
      readings=(),
      start_B=np.arange(B, dtype=np.int32) * R,
      response_BR=self.response_BR,
      weight_BR=self.weight_BR,
      advantage_BR=np.zeros((B, R), np.float32),
      route_B=np.zeros(B, np.float32),
      logp_rollout_BR=np.zeros((B, R), np.float32),
      logp_old_BR=np.zeros((B, R), np.float32),
      control={},
    )


class PackedRows:
  """Packs corpus rows, first fit, into batches; what does not fit is left out and counted."""

  def __init__(
    self,
    text: Callable[[int, int], Text],
    pad_token: int,
    *,
    rows: int,
    length: int,
    responses: int,
    texts: int,
    seed: int,
  ):
    """Keeps the sizes of a batch.

    Args:
      text: returns the corpus row of (seed, index).
      rows, length: packed rows of a batch, and tokens of each.
      responses: response tokens that a packed row can hold.
      texts: corpus rows drawn for a batch.
    """
    self.text, self.pad_token = text, pad_token
    self.rows, self.length, self.responses = rows, length, responses
    self.texts, self.seed = texts, seed

  def __getitem__(self, step: int) -> tuple[TrainBatch, dict[str, float]]:
    """Returns the batch of a step, and metrics of how full it is."""
    pack = Pack(self.rows, self.length, self.responses, self.pad_token)
    texts = [self.text(self.seed, step * self.texts + i) for i in range(self.texts)]
    left_out = 0
    # the longest prompt first: what is short fills the gaps
    for text in sorted(texts, key=lambda text: text.weights.count(1.0) - len(text.tokens)):
      if not pack.add(text):
        left_out += 1
    return pack.batch(), {
      "data/useful_tokens": sum(pack.columns_B) / (self.rows * self.length),
      "data/left_out": left_out / self.texts,
    }


def mixture(domain: str, settings: dict) -> Mixture | household_rows.Mixture:
  """Returns the settings of a domain's corpus."""
  kind = household_rows.Mixture if domain == HOUSEHOLD else Mixture
  return kind(**settings)


def batches(c, chat: Chat) -> PackedRows:
  """Returns the batches of a configuration; ValueError for sizes that nothing fits into."""
  settings = mixture(c.domain, c.corpus)
  if c.domain == HOUSEHOLD:
    text = household_rows.HouseholdRows(chat, settings).text
  else:
    text = functools.partial(Corpus(DOMAINS[c.domain][0], settings).text, chat)
  data = PackedRows(text, chat.pad_token, seed=c.seed, **c.batch)
  _, counts = data[0]
  if counts["data/left_out"] == 1:
    raise ValueError(
      f"config.batch.length={c.batch.length} and config.batch.responses={c.batch.responses} "
      f"have room for none of the first batch's {c.batch.texts} texts"
    )
  return data


# ---- accuracy ------------------------------------------------------------------------------------


def accuracy(
  params,
  chat: Chat,
  domain,
  corpus_settings: dict,
  *,
  questions: int,
  sampler: LocalEngine,
  max_new_tokens: int,
) -> dict[str, float]:
  """Returns the share of problems with novel words that greedy decoding solves, by view.

  A problem has at least one novel word. The views are what a prompt shows: `plain`, `feedback`,
  `solution`, and `notes` and `imagine` if the corpus has them. `notes` tells of failures alone.
  `imagine` is the share of verdicts that are right word for word, `imagine_verdict` of those whose
  first line is.
  """
  accuracies, settings = {}, corpus_settings | {"twist": 0.0}
  of_the_corpus = [view for view in ("notes", "imagine") if settings[view]]
  for view in ("plain", "feedback", "solution", *of_the_corpus):
    problems = _novel_problems(domain, settings, view, questions)
    longest = max_new_tokens
    if view == "imagine":
      longest = max(len(chat.text_tokens(p.response)) for p in problems) + 1
    sampling = Sampling(max_new_tokens=longest, temperature=0.0, stop_tokens=chat.stop_tokens)
    messages = [[{"role": "user", "content": p.message}] for p in problems]
    requests = [
      Request(i, chat.prompt_tokens(m), 1, sampling, seed=0) for i, m in enumerate(messages)
    ]
    sampler.load(params, 0)
    completions = sampler.generate(requests)
    answers = [(chat.response_text(c.tokens), problems[c.key]) for c in completions]
    if view == "imagine":
      exact = [text == p.response for text, p in answers]
      first_line = [text.split("\n")[0] == p.response.split("\n")[0] for text, p in answers]
      accuracies["eval/imagine"] = sum(exact) / len(problems)
      accuracies["eval/imagine_verdict"] = sum(first_line) / len(problems)
    else:
      solved = [domain.solves(text, p.ops, p.kind, p.details) for text, p in answers]
      accuracies[f"eval/{view}"] = sum(solved) / len(problems)
  return accuracies


def _novel_problems(domain, settings: dict, view: str, questions: int) -> list[Problem]:
  """Draws problems of one view that have a novel word; training never sees those of seed -1."""
  shares = dict.fromkeys(VIEWS, 0.0) | {view: 1.0}
  if view == "notes":
    shares["success"] = 0.0
  corpus = Corpus(domain, Mixture(**(settings | shares)))
  problems = [corpus.problem(-1, i) for i in range(4 * questions)]
  return [p for p in problems if any(p.novel)][:questions]


def print_accuracy(accuracies: dict[str, float], questions: int) -> None:
  """Prints the accuracies that there are, in two sentences."""
  views = {
    "eval/plain": "alone",
    "eval/feedback": "given feedback",
    "eval/solution": "given a solution",
    "eval/notes": "given notes",
  }
  solved = [f"{accuracies[key]:.1%} {text}" for key, text in views.items() if key in accuracies]
  print(f"problems with novel words solved (greedy, {questions} problems): {', '.join(solved)}")
  if "eval/imagine" in accuracies:
    print(
      f"verdicts imagined: {accuracies['eval/imagine']:.1%} right word for word, "
      f"{accuracies['eval/imagine_verdict']:.1%} in their first line"
    )


def evaluation(c, model: ModelConfig, chat: Chat) -> Callable[[dict], dict[str, float]]:
  """Returns a function of weights: the accuracies of a configuration's domain, by view."""
  sampler, settings = LocalEngine(model, rows=c.eval.questions), c.eval
  if c.domain == HOUSEHOLD:
    return lambda params: acting.success(params, sampler, chat, tasks=settings.questions)
  return lambda params: accuracy(
    params,
    chat,
    DOMAINS[c.domain][0],
    dict(c.corpus),
    questions=settings.questions,
    sampler=sampler,
    max_new_tokens=settings.max_new_tokens,
  )


# ---- training ------------------------------------------------------------------------------------


def beginning(c, tokenizer) -> tuple[ModelConfig, dict]:
  """Returns the model and its weights before the first step.

  ValueError for a `start` that reads other tokens.
  """
  if c.start:
    path = model_location(c.start)
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
      raise ValueError(
        f"start={c.start!r} has another vocabulary than the base models of domain={c.domain!r}"
      )
    return load_pretrained(path, dtype="float32")
  model = ModelConfig(
    family="qwen3",
    vocab=len(tokenizer),
    eos_ids=(tokenizer.eos_token_id,),
    pad_id=tokenizer.pad_token_id,
    rope=Rope(theta=c.model.rope_theta),
    qk_norm="head",
    tied=True,
    width=c.model.width,
    layers=c.model.layers,
    heads=c.model.heads,
    kv_heads=c.model.kv_heads,
    head_dim=c.model.head_dim,
    ff_width=c.model.ff_width,
    max_positions=c.model.max_positions,
  )
  return model, jax.jit(lambda key: decoder.init(model, key))(jax.random.key(c.seed))


def run(
  c, workdir: str, out: str, model: ModelConfig, params, chat: Chat, data: PackedRows, tx
) -> dict[str, float]:
  """Trains to c.total_steps and writes the model; returns the final accuracies.

  Resumes if the work directory holds a checkpoint.
  """
  method = supervised()
  state = init_state(params, tx)
  step = jax.jit(make_train_step(make_signals(model, method), method, tx), donate_argnums=0)
  evaluate = evaluation(c, model, chat)
  if checkpoint.latest_step(workdir) is not None:
    state, _ = checkpoint.restore(workdir, state)
  first = int(state.step)
  if first >= c.total_steps:
    print(finished(workdir, first, c.total_steps))
  log = Log(c, workdir, first)
  accuracies = {}
  with Notice() as notice:
    for i in range(first, c.total_steps):
      batch, counts = data[i]
      state, measured = step(state, batch)
      last = i + 1 == c.total_steps
      accuracies = {}
      if last or (i + 1) % c.eval.every_steps == 0:
        accuracies = evaluate(state.params)
      if last or (i + 1) % c.log_every_steps == 0:
        logged = jax.device_get({name: measured[key] for name, key in LOGGED.items()})
        means = {name: ratio.mean for name, ratio in logged.items()}
        log.write(i + 1, means | counts | accuracies)
      is_due = last or (i + 1) % c.checkpoint_every_steps == 0
      save_where_due(workdir, i + 1, state, is_due, notice)
  if not accuracies:  # a finished run, started again
    accuracies = evaluate(state.params)
  save_pretrained(out, model, state.params, tokenizer=chat.tokenizer)
  report = acting.print_success if c.domain == HOUSEHOLD else print_accuracy
  report(accuracies, c.eval.questions)
  print(f"wrote {out}")
  return accuracies


def save_where_due(workdir: str, step: int, state, is_due: bool, notice: Notice) -> None:
  """Saves a step that is due, and also one at which the run is asked to stop; see Preempted."""
  try:
    notice.check()
  except Preempted as stop:
    checkpoint.save(workdir, step, state, {})
    message = f"{stop}: the same command goes on from step {step}, which is saved"
    raise Preempted(message) from stop
  if is_due:
    checkpoint.save(workdir, step, state, {})


class Log:
  """config.json and metrics.jsonl of a work directory, from step `first` on."""

  def __init__(self, c, workdir: str, first: int):
    folder = pathlib.Path(workdir)
    # what came after the checkpoint is written again
    kept = [line for line in metrics.read(workdir) if line["step"] <= first]
    write_atomically(folder / "config.json", json.dumps(c.to_dict(), indent=2) + "\n")
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    self._file = open(folder / "metrics.jsonl", "a")
    self._first, self._begun = first, time.time()

  def write(self, step: int, values: dict[str, float | None]) -> None:
    """Appends one line, and prints it without values that are missing."""
    seconds = time.time() - self._begun
    line = {"step": step} | values
    line |= {"time_s": seconds, "perf/steps_per_s": (step - self._first) / seconds}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    texts = [f"{name}={value:.4g}" for name, value in line.items() if value is not None]
    print(" ".join(texts), flush=True)


# ---- the command line ----------------------------------------------------------------------------


def define_flags() -> flags.FlagValues:
  """Defines the flags in a registry of their own, so that importing this file does nothing."""
  f = flags.FlagValues()
  flags.DEFINE_string(
    "config",
    "configs/pretrain_tiny.py",
    "settings: FILE[:key=value,...]; --config.section.key=value changes one",
    flag_values=f,
  )
  flags.DEFINE_string(
    "workdir", "runs/pretrain_tiny", "where checkpoints and metrics go", flag_values=f
  )
  flags.DEFINE_string(
    "out", None, "where the Hugging Face directory goes; default: WORKDIR/hf", flag_values=f
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  return f


def configuration(file_and_argument: str, arguments: list[str]):
  """Returns the file's configuration with the overrides; ValueError for one of other commands."""
  c = with_overrides(load(file_and_argument), arguments)
  if "domain" not in c:
    raise ValueError(
      f"--config={file_and_argument} names no domain: it is a file for python -m sdpo_jax.main"
    )
  domains = sorted([*DOMAINS, HOUSEHOLD])
  if c.domain not in domains:
    raise ValueError(unknown("domain", c.domain, domains))
  check_ranges(c)
  check_optimizer(c.optimizer)
  check_schedule(c.optimizer.decay_steps, c.total_steps)
  return c


def default_settings(file_and_argument: str) -> dict:
  """Returns the settings of a file without overrides; those of the corpus are Mixture's own."""
  settings = load(file_and_argument).to_dict()
  return settings | {"corpus": dataclasses.asdict(mixture(settings["domain"], {}))}


def check_ranges(c) -> None:
  """Raises ValueError for a number outside its range; a model to start from has its own shape."""
  settings = c.to_dict()
  for key in ranges.RANGES:
    prefix, _, path = key.partition(".")
    *sections, name = path.split(".")
    node = settings
    for section in sections:
      node = node.get(section, {})
    if prefix == "pretrain" and name in node:
      ranges.check(key, node[name], setting=f"config.{path}")


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  f = define_flags()
  try:
    rest = f(argv, known_only=True)
    for name in ("config", "workdir", "out"):  # a shell leaves `~` alone after `--flag=`
      f[name].value = f[name].value and local_path(f[name].value)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    c = configuration(f.config, rest)
    begun = checkpoint.latest_step(f.workdir) is not None
    defaults = default_settings(f.config)
    check_same_run(pathlib.Path(f.workdir), c, begun=begun, defaults=defaults)
    is_household = c.domain == HOUSEHOLD
    tokenizer = household_rows.build_tokenizer() if is_household else build_tokenizer(c.domain)
    chat = Chat(tokenizer)
    data = batches(c, chat)
    tx = make_optimizer(**c.optimizer)
    model, params = beginning(c, tokenizer)
    os.makedirs(f.workdir, exist_ok=True)
    if not os.access(f.workdir, os.W_OK):
      raise ValueError(f"--workdir={f.workdir}: cannot write there")
  except (flags.Error, UsageError, ValueError, OSError) as error:
    print(f"sdpo_jax.pretrain: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  checkpoint.tell_failures_once()
  try:
    with blame_disk(f.workdir, checkpoint.latest_step):
      run(c, f.workdir, f.out or os.path.join(f.workdir, "hf"), model, params, chat, data, tx)
  except (RunError, Preempted) as error:
    print(f"sdpo_jax.pretrain: {error}", file=sys.stderr)
    return 143 if isinstance(error, Preempted) else 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
