"""Keeps compiled programs on disk, so that a run's next start need not compile them again.

jax's persistent cache does it. A program is found again by its code, the compiler's version and the
devices; the directory is one for each version and processor besides, since a program compiled for
one processor may not run on another. Whoever can write there can run code in a run, so only its
owner may. Of several processes the first one writes: a directory that all machines share helps all
of them, one of each machine only that one.
"""

import os
import pathlib
import zlib

import jax
import jaxlib

MIN_COMPILE_S = 0.2  # what compiles faster is not kept


def keep_compiled(where: str) -> pathlib.Path | None:
  """Turns jax's persistent cache on, and returns its directory; None if it stays as it was.

  where: "off"; a directory; or "auto", a directory of the user's own, unless the user has told jax
    of another one (JAX_COMPILATION_CACHE_DIR).
  ValueError for a directory that cannot be written.
  """
  if where == "off":
    jax.config.update("jax_enable_compilation_cache", False)
  is_set = where == "auto" and jax.config.jax_compilation_cache_dir is not None
  if is_set or not jax.config.jax_enable_compilation_cache:
    return None
  directory = _own_directory() if where == "auto" else pathlib.Path(where).expanduser().absolute()
  try:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_writable = os.access(directory, os.W_OK)
  except OSError:
    is_writable = False
  if not is_writable:
    if where == "auto":  # no home to write to, as in many containers
      return None
    raise ValueError(f"--compilation_cache={where}: cannot write there")
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
  return directory


def _own_directory() -> pathlib.Path:
  """Returns the directory of this user, this version of the compiler and this processor."""
  root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  name = f"jaxlib-{jaxlib.__version__}-{zlib.crc32(_processor().encode()):08x}"
  return pathlib.Path(root) / "sdpo_jax" / "compiled" / name


def _processor() -> str:
  """Returns what the system says of the processor that a program may depend on."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return ""
  told = ("model name", "flags", "Features", "CPU part")
  return "\n".join(sorted({line for line in lines if line.startswith(told)}))
