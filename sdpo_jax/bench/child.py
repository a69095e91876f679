"""Runs one measurement in a process of its own, and prints results as a table.

The parent imports no jax: a child that runs out of memory costs its own line only, and finds the
device free.
"""

import json
import os
import subprocess
import sys


def measure(name: str, request: dict) -> dict:
  """Returns what `python -m sdpo_jax.bench NAME --child REQUEST` prints in its last line, as JSON.

  request["device"] is cpu, gpu or tpu. A child that fails gives the request with its `error`.
  """
  platform = {"gpu": "cuda"}.get(request["device"], request["device"])
  child = subprocess.run(
    [sys.executable, "-m", "sdpo_jax.bench", name, "--child", json.dumps(request)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
    # without jax's filtering the last line is the error
    env=os.environ | {"JAX_PLATFORMS": platform, "JAX_TRACEBACK_FILTERING": "off"},
  )
  if child.returncode:
    last_line = (child.stderr.strip().splitlines() or ["no output"])[-1]
    return request | {"error": f"exit {child.returncode}: {last_line}"}
  return json.loads(child.stdout.splitlines()[-1])


def table(columns: tuple[str, ...], results: list[dict], *, error_in: str) -> str:
  """Returns a Markdown table.

  A missing figure is left empty; a failed measurement tells why in the column `error_in`.
  """

  def cell(result: dict, column: str) -> str:
    value = result.get(column, result.get("error", "") if column == error_in else "")
    if isinstance(value, (list, tuple)):  # a shape
      return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

  lines = [list(columns), ["---"] * len(columns)]
  lines += [[cell(result, column) for column in columns] for result in results]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
