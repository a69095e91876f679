"""Starts the real server as a process of its own, and talks to it over HTTP."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).parent.parent
TOKEN = "a secret"


@contextlib.contextmanager
def server(*arguments):
  """Yields (url, process) of a server that is ready; ends it if the test has not."""
  process = subprocess.Popen(
    [sys.executable, "-m", "sdpo_jax.serve", "--port=0", f"--token={TOKEN}", *arguments],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    line = process.stdout.readline()
    assert line.startswith("ready: http://127.0.0.1:"), (line, process.communicate())
    yield line.split()[1], process
  finally:
    process.kill()
    process.communicate()


def ask(url, path, body=None, token=TOKEN):
  """Returns (status, answer) of a request; without a body it is a GET."""
  data = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(url + path, data, {"Authorization": f"Bearer {token}"})
  try:
    with urllib.request.urlopen(request, timeout=120) as response:
      return response.status, json.load(response)
  except urllib.error.HTTPError as error:
    return error.code, json.load(error)
