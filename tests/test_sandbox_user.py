"""The sandbox's tests run again as an ordinary user, where root runs the tests."""

import os
import shutil
import subprocess
import sys

import pytest

USER = "65534"  # nobody


def _as_nobody(python: str, *arguments) -> subprocess.CompletedProcess:
  packages = os.path.dirname(os.path.dirname(pytest.__file__))
  environment = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": f"{os.getcwd()}:{packages}",
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  if "SDPO_JAX_DATA" in os.environ:
    environment["SDPO_JAX_DATA"] = os.environ["SDPO_JAX_DATA"]
  return subprocess.run(
    ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", python, *arguments],
    env=environment,
    capture_output=True,
    text=True,
  )


def _python() -> str | None:
  """Returns a Python of this version that everybody may run, with what the tests import.

  This one, or its packages, may lie in root's own directories.
  """
  for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
    version = _as_nobody(
      path,
      "-c",
      "import pytest, sdpo_jax, sys; open(sys.executable, 'rb').close(); "
      "print(sys.version_info[:2])",
    )
    if version.stdout == f"{sys.version_info[:2]}\n":
      return path
  return None


def _run(*arguments) -> str:
  if os.geteuid() != 0:
    pytest.skip("the tests run as an ordinary user already")
  python = _python() if shutil.which("setpriv") else None
  if python is None:
    pytest.skip(
      "needs setpriv, and a Python of this version, pytest and this package where an "
      "ordinary user may read them"
    )
  done = _as_nobody(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
  return done.stdout


def test_a_few():
  assert "3 passed" in _run(
    "tests/test_sandbox.py",
    "-k",
    "functions_and_expressions or verdict_of_each or missing_bubblewrap",
  )


@pytest.mark.slow
def test_everything():
  output = _run(
    "tests/test_sandbox.py", "tests/test_sandbox_attacks.py", "tests/test_sandbox_cases.py"
  )
  assert "passed" in output
  assert "failed" not in output
