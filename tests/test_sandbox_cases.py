"""The shared programs: correct ones pass, wrong ones fail as declared, attacks leave nothing.

The programs are read from the folder `sandbox_cases` beside the one that SDPO_JAX_DATA names.
Attacks run inside the sandbox only. Each is checked by itself (verdict, feedback, time) and all of
them together for what they may have done to the host: files, connections, processes, descriptors.
"""

import concurrent.futures
import json
import os
import pathlib
import sys
import time

import pytest

from sdpo_jax.sandbox import Limits, Sandbox, TestCase, installed
from tests.sandbox_host import Host, check_text, descendants, descriptors, left_open, starved

_DATA = os.environ.get("SDPO_JAX_DATA")
_CASES = pathlib.Path(_DATA).parent / "sandbox_cases" if _DATA else None
needs_cases = pytest.mark.skipif(
  _CASES is None or not _CASES.is_dir(),
  reason="SDPO_JAX_DATA is unset or has no folder sandbox_cases beside it",
)


def rows(name):
  if _CASES is None or not _CASES.is_dir():
    return []
  return [json.loads(line) for line in (_CASES / name).open()]


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(workers=2) as pool:
    yield pool


def limits(row):
  return Limits(time_s=row["time_limit"], memory_mb=row["memory_mb"])


def judge(sandbox, row, program=None):
  tests = [TestCase(t["input"], t["output"]) for t in row["tests"]]
  return sandbox.run(
    row["program"] if program is None else program,
    tests,
    fn_name=row["fn_name"],
    limits=limits(row),
  )


@needs_cases
@pytest.mark.parametrize(
  "row", rows("correct.jsonl") + rows("wrong.jsonl"), ids=lambda row: row["name"]
)
def test_declared(sandbox, row):
  missing = [name for name in row["requires"] if not installed(name)]
  if missing:
    pytest.skip(f"{missing} not installed")
  if row.get("stack_mb", 8) > 8 and sys.version_info >= (3, 12):
    pytest.skip("since 3.12 CPython limits recursion through C functions by itself")
  verdict = judge(sandbox, row)
  for _ in range(3):  # again, where the machine gave it no time
    if starved(verdict, limits(row)) and row["expect"]["kind"] != "time_limit":
      verdict = judge(sandbox, row)
  assert verdict.kind == row["expect"]["kind"].replace("ok", "passed"), verdict.feedback
  assert verdict.passed == row["expect"]["passed"]
  error = next((t.error for t in verdict.tests if t.error), None)
  if verdict.kind == "runtime_error":
    assert error.type == row["expect"]["detail"] and error.type in verdict.feedback and error.line


@needs_cases
@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_attacks(isolation, tmp_path_factory, monkeypatch):
  host = Host(tmp_path_factory.mktemp("canary"))
  monkeypatch.setenv("SBX_CANARY", host.token)
  before, opened = descendants(), descriptors()
  try:
    # most of the time limits are waited out asleep
    pool = Sandbox(workers=6, isolation=isolation)
  except RuntimeError as e:
    pytest.skip(str(e))
  with pool as sandbox:

    def attack(row):
      for setup in row.get("setup") or []:
        judge(sandbox, row, host.fill(setup))
      start = time.monotonic()
      verdict = judge(sandbox, row, host.fill(row["program"]))
      return row, verdict, time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
      done = list(threads.map(attack, rows("attacks.jsonl")))
    wrong = []
    for row, verdict, wall_s in done:
      expect = row["expect"]
      for _ in range(3):  # again without the five others, where the machine gave it no time
        if (
          wall_s > expect["max_wall_s"]
          or starved(verdict, limits(row))
          and "time_limit" not in expect["kinds"]
        ):
          row, verdict, wall_s = attack(row)
      if verdict.passed or verdict.kind not in expect["kinds"] or wall_s > expect["max_wall_s"]:
        wrong.append((row["name"], verdict.kind, wall_s, verdict.feedback))
      check_text(
        verdict.feedback,
        expect["feedback_must_not_contain"] + [host.token],
        expect["feedback_max_chars"],
      )
      assert not any(host.token in t.output for t in verdict.tests), row["name"]
    assert len(done) == 60 and not wrong
    for _ in range(6):
      assert sandbox.run("print(int(input()) + 1)", [TestCase("1", "2")]).passed
    host.check()
  assert not descendants() - before
  assert not left_open(opened)
