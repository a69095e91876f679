r"""Serves a model over HTTP: sampling with log-probabilities, and scores of given texts.

  python -m sdpo_jax.serve --checkpoint=WORKDIR[:step]|HF_DIR|NAME \
      [--host=127.0.0.1] [--port=8000] [--token=...] [--rows=32] [--dtype=float32]

NAME is a model with a short name, such as tiny or qwen3-8b. The package's docstring lists the
routes. The model lies on the first device. Prints one line with the address when it is ready.

Only this machine can reach the default address. On another one the server talks to whoever shows
the token (`Authorization: Bearer TOKEN`), which the variable SDPO_JAX_TOKEN may hold as well. HTTP
is not encrypted: across networks that others listen to, put a proxy with TLS before it.

Exit status: 0 when stopped by SIGINT, 143 by SIGTERM, 2 a wrong argument or checkpoint, 1 where the
engine has failed.
"""

import contextlib
import ipaddress
import os
import signal
import socket
import sys

from absl import flags

from sdpo_jax.errors import Preempted, RunError, SettingError, UsageError, local_path

GRACE_S = 2  # that requests have to end after the server is asked to stop


def define_flags() -> flags.FlagValues:
  """Defines the flags in a registry of their own, so that importing this file does nothing."""
  f = flags.FlagValues()
  flags.DEFINE_string(
    "checkpoint",
    None,
    "WORKDIR[:step], a Hugging Face directory, or a model's short name",
    flag_values=f,
  )
  flags.DEFINE_string("host", "127.0.0.1", "address to listen on", flag_values=f)
  flags.DEFINE_integer(
    "port", 8000, "0: any that is free", lower_bound=0, upper_bound=65535, flag_values=f
  )
  flags.DEFINE_string(
    "token", None, "what clients must show; default: the variable SDPO_JAX_TOKEN", flag_values=f
  )
  flags.DEFINE_integer(
    "rows", 32, "sequences decoded together", lower_bound=1, upper_bound=4096, flag_values=f
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "type of weights and products; default: the run's, or float32",
    flag_values=f,
  )
  flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "where compiled programs are kept: auto (~/.cache/sdpo_jax), off, or DIR",
    flag_values=f,
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=f)
  return f


def main(argv: list[str]) -> int:
  """Runs the command and returns its exit status."""
  f = define_flags()
  try:
    rest = f(argv)
    if f.help:
      print(__doc__, f.get_help(), sep="\n")
      return 0
    if len(rest) > 1:
      raise UsageError(f"unknown argument {rest[1]!r}")
    serve(f)
  except (flags.Error, UsageError, SettingError, Preempted, RunError) as error:
    print(f"sdpo_jax: {' '.join(str(error).split())}", file=sys.stderr)
    if isinstance(error, Preempted):
      return 143
    return 1 if isinstance(error, RunError) else 2
  return 0


def serve(f: flags.FlagValues) -> None:
  """Serves until it is asked to stop.

  Raises UsageError or SettingError for what forbids it, Preempted after SIGTERM, and RunError where
  the engine has failed.
  """
  token = f.token or os.environ.get("SDPO_JAX_TOKEN", "")
  if not f.checkpoint:
    raise UsageError("--checkpoint=WORKDIR[:step], a Hugging Face directory or a name is needed")
  check_address(f.host, token)
  try:
    from sdpo_jax.serve.lifetime import Server
  except ImportError as error:
    raise SettingError(
      f"{error.name} is not installed: pip install 'sdpo_jax[serve]' brings what the server needs"
    ) from error
  # now: jax takes seconds to import
  from sdpo_jax.compilation import keep_compiled
  from sdpo_jax.serve.weights import load_checkpoint

  with contextlib.ExitStack() as stack:
    try:
      listener = stack.enter_context(listen(f.host, f.port))
      keep_compiled(f.compilation_cache)
      loaded = load_checkpoint(local_path(f.checkpoint), f.dtype)
    except (ValueError, OSError) as error:
      raise SettingError(str(error)) from error
    server = Server(f.checkpoint, loaded, rows=f.rows, token=token)
    server.run(listener, grace_s=GRACE_S)
  if server.failure is not None:
    raise RunError(f"the engine has failed: {server.failure}; the traceback stands above")
  if server.signal == signal.SIGTERM:
    raise Preempted("asked to stop (SIGTERM): the same command serves again")


def check_address(host: str, token: str) -> None:
  """Raises UsageError for an address that others can reach while no token is asked for."""
  try:
    is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    is_loopback = False
  if not is_loopback and not token:
    raise UsageError(
      f"--host={host} can be reached from other machines: set --token or SDPO_JAX_TOKEN"
    )


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens. OSError, of one line, where it cannot."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise OSError(f"--host={host} --port={port}: cannot listen there: {error.strerror}") from error


if __name__ == "__main__":
  sys.exit(main(sys.argv))
