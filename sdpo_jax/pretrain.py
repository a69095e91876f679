"""Supervised pre-training of the tiny base models: the same train step, another loss.

  python -m sdpo_jax.pretrain --config=configs/pretrain_tiny.py[:domain=arithmetic][,start=HF_DIR] --workdir=DIR [--out=HF_DIR]

Reads a synthetic corpus (data/corpus.py): statements to programs, with and without hindsight, packed into fixed rows with
segment ids. The batch of step i is a pure function of (seed, i), so a killed run resumes from its checkpoint exactly. Begins with random
weights, or with those of `start`, a model of the same vocabulary. Ends by printing the accuracy on problems with novel words, alone and given
feedback or a solution, or notes (greedy, exact behaviour), the share of verdicts that the model imagines rightly, where the corpus has them,
and by writing a Hugging Face directory. Exit 0 on success, 2 on a wrong setting or a work directory that was begun with other ones, 1 on a full disk.
"""

import json
import os
import pathlib
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax import checkpoint, metrics
from sdpo_jax.config import MODELS, check_optimizer, load, overridden
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import DOMAINS, VIEWS, Corpus, Mixture, build_tokenizer
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.errors import RunError, blame_disk
from sdpo_jax.model import decoder
from sdpo_jax.model.config import ModelConfig, Rope
from sdpo_jax.model.hf_weights import load_pretrained, save_pretrained
from sdpo_jax.objectives.loss import Objective
from sdpo_jax.optimizer import make_optimizer
from sdpo_jax.records import Ratio, Rows, Sampling, TrainBatch
from sdpo_jax.train_step import init_state, make_signals, make_train_step
from sdpo_jax.workdir import check_same_run, write_atomically


def supervised() -> Objective:
  """Mean negative log-likelihood of the response tokens, in nats."""
  normalisers = lambda batch: {"nll": jnp.maximum(jnp.sum(batch.weight_BR), 1.0)}

  def token_loss(signals, batch, norm):
    total = -jnp.sum(signals.logp_BR * batch.weight_BR)
    return total / norm["nll"], {"train/nll": Ratio(total, jnp.sum(batch.weight_BR))}

  return Objective(token_loss, normalisers, None, needs_teacher=False)


class PackedRows:
  """Packs corpus rows, first fit, into [rows, length] with segments. What does not fit is left out and counted."""

  def __init__(
    self,
    corpus: Corpus,
    chat: Chat,
    *,
    rows: int,
    length: int,
    responses: int,
    texts: int,
    seed: int,
  ):
    """responses: response tokens a packed row can hold; texts: corpus rows drawn per batch."""
    self.corpus, self.chat, self.rows, self.length, self.responses, self.texts, self.seed = (
      corpus,
      chat,
      rows,
      length,
      responses,
      texts,
      seed,
    )

  def __getitem__(self, step: int) -> tuple[TrainBatch, dict[str, float]]:
    B, T, R = self.rows, self.length, self.responses
    zeros = lambda *shape: np.zeros(shape, np.int32)
    token, segment, position = (
      np.full((B, T), self.chat.pad_token, np.int32),
      zeros(B, T),
      zeros(B, T),
    )
    pos, response, weight = zeros(B, R), zeros(B, R), np.zeros((B, R), np.float32)
    used, answered, count, left_out = [0] * B, [0] * B, [0] * B, 0
    texts = []
    for i in range(step * self.texts, (step + 1) * self.texts):
      problem = self.corpus.problem(self.seed, i)
      texts.append(
        (
          self.chat.prompt_tokens([{"role": "user", "content": problem.message}]),
          self.chat.text_tokens(problem.response) + [self.chat.stop_tokens[0]],
        )
      )
    # the longest first: what is short fills the gaps
    for p, a in sorted(texts, key=lambda pair: -len(pair[0])):
      b = next(
        (b for b in range(B) if used[b] + len(p) + len(a) <= T and answered[b] + len(a) <= R), None
      )
      if b is None:
        left_out += 1
        continue
      start, n = used[b], len(p) + len(a)
      count[b] += 1
      token[b, start : start + n], segment[b, start : start + n], position[b, start : start + n] = (
        p + a,
        count[b],
        np.arange(n),
      )
      at = slice(answered[b], answered[b] + len(a))
      pos[b, at], response[b, at], weight[b, at] = (
        np.arange(start + len(p) - 1, start + n - 1),
        a,
        1.0,
      )
      used[b] += n
      answered[b] += len(a)
    nothing = np.zeros((B,), np.float32)
    pos += T * np.arange(B)[:, None]  # one pack: columns of all rows, one after another
    student = Rows(*(x[None] for x in (token, segment, position)), None, pos.reshape(-1)[None])
    teacher = Rows(*(np.zeros((1, 1, 1), np.int32),) * 3, None, np.zeros((1, B * R), np.int32))
    batch = TrainBatch(
      student,
      teacher,
      np.arange(B, dtype=np.int32) * R,
      response,
      weight,
      nothing,
      nothing,
      np.zeros((B, R), np.float32),
      np.zeros((B, R), np.float32),
    )
    return batch, {
      "data/useful_tokens": sum(used) / (B * T),
      "data/left_out": left_out / self.texts,
    }


def accuracy(
  params,
  model: ModelConfig,
  chat: Chat,
  domain,
  corpus_settings: dict,
  *,
  questions: int,
  sampler: LocalEngine,
  max_new_tokens: int,
) -> dict[str, float]:
  """Share of problems with at least one novel word that greedy decoding solves, by what the prompt shows; both kinds of hindsight on other attempts if
  the corpus has them. Of these `notes` tells of failures alone, and `imagine` is the share of verdicts that are right word for word, `imagine_verdict`
  of those whose first line is."""
  out, settings = {}, corpus_settings | {"twist": 0.0}
  for view in [
    v for v in VIEWS if v in ("plain", "feedback", "solution") or (v != "both" and settings[v])
  ]:
    only = dict.fromkeys(VIEWS, 0.0) | {view: 1.0} | ({"success": 0.0} if view == "notes" else {})
    corpus = Corpus(domain, Mixture(**(settings | only)))
    rows = [corpus.problem(-1, i) for i in range(4 * questions)]
    rows = [r for r in rows if any(r.novel)][:questions]  # seed -1: never trained on
    prompts = [chat.prompt_tokens([{"role": "user", "content": r.message}]) for r in rows]
    longest = (
      max(len(chat.text_tokens(r.response)) for r in rows) + 1
      if view == "imagine"
      else max_new_tokens
    )
    sampling = Sampling(max_new_tokens=longest, temperature=0.0, stop_tokens=chat.stop_tokens)
    said = [
      (chat.response_text(c.tokens), rows[c.prompt_index])
      for c in sampler.generate(params, prompts, n=1, sampling=sampling, seeds=[0] * len(prompts))
    ]
    if view == "imagine":
      out["eval/imagine"] = sum(text == row.response for text, row in said) / len(rows)
      out["eval/imagine_verdict"] = sum(
        text.split("\n")[0] == row.response.split("\n")[0] for text, row in said
      ) / len(rows)
    else:
      out[f"eval/{view}"] = sum(domain.solves(text, *row[2:5]) for text, row in said) / len(rows)
  return out


def beginning(c, tokenizer) -> tuple[ModelConfig, dict]:
  """The model and its weights before the first step. ValueError for a `start` that reads other tokens."""
  if c.start:
    path = MODELS.get(c.start, c.start)
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


def batches(c, tokenizer) -> PackedRows:
  """ValueError for sizes that nothing fits into."""
  for name, value in c.batch.items():
    if value < 1:
      raise ValueError(f"config.batch.{name}={value} must be at least 1")
  data = PackedRows(
    Corpus(DOMAINS[c.domain][0], Mixture(**c.corpus)), Chat(tokenizer), seed=c.seed, **c.batch
  )
  if data[0][1]["data/left_out"] == 1:
    raise ValueError(
      f"config.batch.length={c.batch.length} and config.batch.responses={c.batch.responses} have room for none of the first batch's {c.batch.texts} texts"
    )
  return data


def run(
  c, workdir: str, out: str, model: ModelConfig, params, data: PackedRows, tx
) -> dict[str, float]:
  """Trains to c.total_steps, resuming if the workdir holds a checkpoint; returns the final accuracies."""
  domain, chat, mixture = data.corpus.domain, data.chat, dict(c.corpus)
  state = init_state(params, tx)
  objective = supervised()
  step = jax.jit(make_train_step(make_signals(model, objective), objective, tx), donate_argnums=0)
  sampler = LocalEngine(
    model, rows=c.eval.questions, prompt_multiple=128, chunk=64, pad_token=chat.pad_token
  )
  if checkpoint.latest_step(workdir) is not None:
    state, _ = checkpoint.restore(workdir, state)
  # what came after the checkpoint is written again
  kept = [line for line in metrics.read(workdir) if line["step"] <= int(state.step)]
  write_atomically(pathlib.Path(workdir) / "config.json", json.dumps(c.to_dict(), indent=2) + "\n")
  write_atomically(
    pathlib.Path(workdir) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept)
  )
  log = open(os.path.join(workdir, "metrics.jsonl"), "a")
  begun, begun_step = time.time(), int(state.step)
  results = {}
  for i in range(int(state.step), c.total_steps):
    batch, counts = data[i]
    state, measured = step(state, batch)
    last = i + 1 == c.total_steps
    if last or (i + 1) % c.eval.every_steps == 0:
      results = accuracy(
        state.params,
        model,
        chat,
        domain,
        mixture,
        questions=c.eval.questions,
        sampler=sampler,
        max_new_tokens=c.eval.max_new_tokens,
      )
    if last or (i + 1) % c.log_every_steps == 0:
      line = (
        {"step": i + 1}
        | {k: r.mean for k, r in jax.device_get(measured).items()}
        | counts
        | results
      )
      line |= {
        "time_s": time.time() - begun,
        "perf/steps_per_s": (i + 1 - begun_step) / (time.time() - begun),
      }
      log.write(json.dumps(line) + "\n")
      log.flush()
      print(" ".join(f"{k}={v:.4g}" for k, v in line.items() if v is not None), flush=True)
    results = results if last else {}
    if last or (i + 1) % c.checkpoint_every_steps == 0:
      checkpoint.save(workdir, i + 1, state, {})
  if not results:  # a finished run, started again
    results = accuracy(
      state.params,
      model,
      chat,
      domain,
      mixture,
      questions=c.eval.questions,
      sampler=sampler,
      max_new_tokens=c.eval.max_new_tokens,
    )
  save_pretrained(out, model, state.params, tokenizer=chat.tokenizer)
  given = {
    "eval/plain": "alone",
    "eval/feedback": "given feedback",
    "eval/solution": "given a solution",
    "eval/notes": "given notes",
  }
  print(
    f"problems with novel words solved (greedy, {c.eval.questions} problems): "
    + ", ".join(f"{results[k]:.1%} {text}" for k, text in given.items() if k in results)
  )
  if "eval/imagine" in results:
    print(
      f"verdicts imagined: {results['eval/imagine']:.1%} right word for word, {results['eval/imagine_verdict']:.1%} in their first line"
    )
  print(f"wrote {out}")
  return results


def main(argv: list[str]) -> int:
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
  try:
    rest = f(argv, known_only=True)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    c = overridden(load(f.config), rest)
    if "domain" not in c:
      raise ValueError(
        f"--config={f.config} names no domain: it is a file for python -m sdpo_jax.main"
      )
    if c.domain not in DOMAINS:
      raise ValueError(f"domain={c.domain!r} is unknown; choose from {sorted(DOMAINS)}")
    check_optimizer(c.optimizer)
    check_same_run(pathlib.Path(f.workdir), c, begun=checkpoint.latest_step(f.workdir) is not None)
    tokenizer = build_tokenizer(c.domain)
    data, tx = batches(c, tokenizer), make_optimizer(**c.optimizer)
    model, params = beginning(c, tokenizer)
    os.makedirs(f.workdir, exist_ok=True)
    if not os.access(f.workdir, os.W_OK):
      raise ValueError(f"--workdir={f.workdir}: cannot write there")
  except (flags.Error, ValueError, OSError) as error:
    print(f"sdpo_jax.pretrain: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  checkpoint.tell_failures_once()
  try:
    with blame_disk(f.workdir, checkpoint.latest_step):
      run(c, f.workdir, f.out or os.path.join(f.workdir, "hf"), model, params, data, tx)
  except RunError as error:
    print(f"sdpo_jax.pretrain: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
