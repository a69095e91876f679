"""A finished run's weights as a directory that transformers and vLLM load.

  python -m sdpo_jax.export --workdir=RUN --out=DIR [--step=N] [--dtype=bfloat16]

Reads the policy's parameters of a checkpoint (the newest without --step; 0: the model that the run began with) and writes
config, weights, tokenizer with its chat template and generation config. Without --dtype weights keep the run's type.
Exit status: 0 success, 2 a wrong argument, work directory or checkpoint (one line on stderr). DIR must be absent or empty.
"""

import dataclasses
import json
import os
import pathlib
import sys

from absl import flags


def export(workdir, out, *, step: int | None = None, dtype: str | None = None) -> int:
  """Writes the policy of checkpoint `step` to `out`; returns the step taken. ValueError, FileNotFoundError or OSError, one line."""
  import jax   # here: a wrong argument answers at once, jax takes seconds to import

  from sdpo_jax import checkpoint
  from sdpo_jax.config import MODELS
  from sdpo_jax.data.chat import load_tokenizer
  from sdpo_jax.model import decoder, hf_weights

  workdir, out = pathlib.Path(workdir), pathlib.Path(out)
  settings_file = workdir / "config.json"
  if not settings_file.exists():
    raise FileNotFoundError(f"--workdir={workdir}: no config.json, so no run began there")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"--out={out} exists and is not an empty directory")
  model = json.loads(settings_file.read_text(encoding="utf-8"))["model"]
  source = hf_weights.local_directory(MODELS.get(model["path"], model["path"]))
  if step == 0:
    config, params = hf_weights.load_pretrained(source, dtype=model["param_dtype"])
  else:
    config = hf_weights.read_config(source, dtype=model["param_dtype"])
    step = checkpoint.latest_step(workdir) if step is None else step
    params = checkpoint.restore_params(workdir, decoder.shapes(config), step)
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
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "type of the written weights; default: the run's", flag_values=f)
  try:
    rest = f(argv)
    if len(rest) > 1:
      raise ValueError(f"unknown argument {rest[1]!r}")
    for name in ("workdir", "out"):
      if f[name].value is None:
        raise ValueError(f"--{name}=... is needed")
    step = export(f.workdir, f.out, step=f.step, dtype=f.dtype)
  except (flags.Error, ValueError, OSError, KeyError) as error:
    print(f"sdpo_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(f"step {step} of {os.path.abspath(f.workdir)} written to {os.path.abspath(f.out)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
