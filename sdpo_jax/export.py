"""A finished run's weights as a directory that transformers and vLLM load.

  python -m sdpo_jax.export --workdir=RUN --out=DIR [--step=N] [--dtype=bfloat16] [--adapters]

Reads the policy's parameters of a checkpoint (the newest without --step; 0: the model that the run began with) and writes
config, weights, tokenizer with its chat template and generation config. Without --dtype weights keep the run's type. Adapters of a LoRA
run are merged into the weights they stand on; --adapters writes them alone instead, as a PEFT directory.
Exit status: 0 success, 2 a wrong argument, work directory or checkpoint, or a disk without room (one line on stderr). DIR must be absent or empty.
"""

import dataclasses
import os
import pathlib
import sys

from absl import flags


def export(
  workdir, out, *, step: int | None = None, dtype: str | None = None, adapters: bool = False
) -> int:
  """Writes the policy of checkpoint `step` to `out`; returns the step taken. ValueError, FileNotFoundError or OSError, one line."""
  import jax  # here: a wrong argument answers at once, jax takes seconds to import

  from sdpo_jax import checkpoint
  from sdpo_jax.config import MODELS, model_of_run
  from sdpo_jax.data.chat import load_tokenizer
  from sdpo_jax.model import decoder, hf_weights, lora

  workdir, out = pathlib.Path(workdir), pathlib.Path(out)
  if not (workdir / "config.json").exists():
    raise FileNotFoundError(f"--workdir={workdir}: no config.json, so no run began there")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"--out={out} exists and is not an empty directory")
  model = model_of_run(workdir)
  source = hf_weights.local_directory(MODELS.get(model["path"], model["path"]))
  about = lora.from_settings(model)
  if adapters and (about is None or step == 0):
    raise ValueError(
      f"--adapters: {workdir} has none"
      + (" at step 0" if about else "; its run trained all weights")
    )
  if step != 0:
    step = checkpoint.latest_step(workdir) if step is None else step
  if step == 0 or about:
    config, params = hf_weights.load_pretrained(source, dtype=model["param_dtype"])
  else:
    config = hf_weights.read_config(source, dtype=model["param_dtype"])
  if step != 0:
    trained = checkpoint.restore_params(
      workdir, lora.shapes(config, about) if about else decoder.shapes(config), step
    )
    if adapters:
      if dtype is not None:
        trained = jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)), trained)
      lora.save_adapters(out, config, about, trained, base=model["path"])
      return step
    params = lora.merge(params, trained, about) if about else trained
  if dtype is not None:
    config = dataclasses.replace(config, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)), params)
  hf_weights.save_pretrained(out, config, params, tokenizer=load_tokenizer(source))
  return step


def main(argv: list[str]) -> int:
  f = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "the run's work directory", flag_values=f)
  flags.DEFINE_integer("step", None, "checkpoint to take; default: the newest", flag_values=f)
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
  try:
    rest = f(argv)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    if len(rest) > 1:
      raise ValueError(f"unknown argument {rest[1]!r}")
    for name in ("workdir", "out"):
      if f[name].value is None:
        raise ValueError(f"--{name}=... is needed")
    step = export(f.workdir, f.out, step=f.step, dtype=f.dtype, adapters=f.adapters)
  except (flags.Error, ValueError, OSError, KeyError) as error:
    # the system's: a write that found no room does not say where
    if isinstance(error, OSError) and error.errno:
      error = f"{error.strerror}: {error.filename or f.out}"
    print(f"sdpo_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(f"step {step} of {os.path.abspath(f.workdir)} written to {os.path.abspath(f.out)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
