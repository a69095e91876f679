r"""Writes a finished run's weights as a directory that transformers and vLLM load.

  python -m sdpo_jax.export --workdir=RUN --out=DIR [--step=N|best] [--dtype=bfloat16] [--adapters]

Reads the policy's parameters of a checkpoint: without --step the newest, with --step=best the one
that config.checkpoint.best kept, with --step=0 the model that the run began with. Writes config,
weights, tokenizer with its chat template, and generation config. Without --dtype weights keep the
run's type. DIR must be absent or empty.

Adapters of a LoRA run are merged into the weights they stand on. --adapters writes them alone
instead, as a PEFT directory.

Exit status: 0 success, 2 a wrong argument, work directory or checkpoint, or a disk without room
(one line on stderr).
"""

import dataclasses
import os
import pathlib
import sys

from absl import flags

from sdpo_jax.errors import UsageError, local_path


def export(
  workdir, out, *, step: int | None = None, dtype: str | None = None, adapters: bool = False
) -> int:
  """Writes the policy of checkpoint `step` to `out`; returns the step taken.

  ValueError, FileNotFoundError or OSError of one line for what cannot be read or written.
  """
  # here: a wrong argument answers at once, jax takes seconds to import
  from sdpo_jax import checkpoint
  from sdpo_jax.config import model_of_run
  from sdpo_jax.data.chat import load_tokenizer
  from sdpo_jax.model import hf_weights, lora

  workdir, out = pathlib.Path(workdir), pathlib.Path(out)
  if not (workdir / "config.json").exists():
    raise FileNotFoundError(f"--workdir={workdir}: no config.json, so no run began there")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"--out={out} exists and is not an empty directory")
  settings = model_of_run(workdir)
  trained_adapters = lora.from_settings(settings)
  if adapters and (trained_adapters is None or step == 0):
    reason = " at step 0" if trained_adapters else "; its run trained all weights"
    raise ValueError(f"--adapters: {workdir} has none{reason}")
  if step is None:
    step = checkpoint.latest_step(workdir)
  if adapters:
    source, config = shape_of_run(settings)
    trained = checkpoint.restore_params(workdir, lora.shapes(config, trained_adapters), step)
    lora.save_adapters(out, config, trained_adapters, _cast(trained, dtype), base=settings["path"])
    return step
  source, config, params = policy_of_run(workdir, step)
  if dtype is not None:
    config = dataclasses.replace(config, param_dtype=dtype)
  hf_weights.save_pretrained(out, config, _cast(params, dtype), tokenizer=load_tokenizer(source))
  return step


def shape_of_run(settings: dict):
  """Returns (directory of the model that a run began with, its shape), from config.model."""
  from sdpo_jax.config import model_location
  from sdpo_jax.model import hf_weights

  source = hf_weights.local_directory(model_location(settings["path"]))
  return source, hf_weights.read_config(source, dtype=settings["param_dtype"])


def policy_of_run(workdir, step: int | None):
  """Returns (directory of the model that the run began with, its shape, the policy's weights).

  step: of the checkpoint; 0: the model itself; None: the newest. Adapters are merged. ValueError,
  FileNotFoundError or OSError of one line for what cannot be read.
  """
  from sdpo_jax import checkpoint
  from sdpo_jax.config import model_of_run
  from sdpo_jax.model import decoder, hf_weights, lora

  settings = model_of_run(workdir)
  source, config = shape_of_run(settings)
  adapters = lora.from_settings(settings)
  if step != 0 and adapters is None:
    return source, config, checkpoint.restore_params(workdir, decoder.shapes(config), step)
  config, params = hf_weights.load_pretrained(source, dtype=settings["param_dtype"])
  if step != 0:
    trained = checkpoint.restore_params(workdir, lora.shapes(config, adapters), step)
    params = lora.merge(params, trained, adapters)
  return source, config, params


def _cast(params, dtype: str | None):
  """Returns parameters in a type; None: as they are."""
  import jax

  if dtype is None:
    return params
  return jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)), params)


def _step(workdir: str, given: str | None) -> int | None:
  """Returns the step that --step names; ValueError if it names none."""
  if given == "best":
    from sdpo_jax import checkpoint

    return checkpoint.best_step(workdir)
  if given is not None and not given.isdigit():
    raise ValueError(f"--step={given!r}: give the number of a checkpoint, or best")
  return None if given is None else int(given)


def define_flags() -> flags.FlagValues:
  """Defines the flags in a registry of their own, so that importing this file does nothing."""
  f = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "the run's work directory", flag_values=f)
  flags.DEFINE_string(
    "step", None, "checkpoint to take, a number or best; default: the newest", flag_values=f
  )
  flags.DEFINE_string("out", None, "directory to write; absent or empty", flag_values=f)
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "type of the written weights; default: the run's",
    flag_values=f,
  )
  flags.DEFINE_bool(
    "adapters", False, "write a LoRA run's adapters alone, in PEFT's format", flag_values=f
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  return f


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  f = define_flags()
  try:
    rest = f(argv)
    for name in ("workdir", "out"):  # a shell leaves `~` alone after `--flag=`
      f[name].value = f[name].value and local_path(f[name].value)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    if len(rest) > 1:
      raise ValueError(f"unknown argument {rest[1]!r}")
    for name in ("workdir", "out"):
      if f[name].value is None:
        raise ValueError(f"--{name}=... is needed")
    step = _step(f.workdir, f.step)
    step = export(f.workdir, f.out, step=step, dtype=f.dtype, adapters=f.adapters)
  except (flags.Error, UsageError, ValueError, OSError, KeyError) as error:
    message = str(error)
    if isinstance(error, OSError) and error.errno:
      # the system's own: a write that found no room does not say where
      message = f"{error.strerror}: {error.filename or f.out}"
    print(f"sdpo_jax: {' '.join(message.split())}", file=sys.stderr)
    return 2
  print(f"step {step} of {os.path.abspath(f.workdir)} written to {os.path.abspath(f.out)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
