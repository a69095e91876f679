"""The sandbox runs programs that nobody trusts and judges what they return.

This file is its one door: outside code imports `from sdpo_jax.sandbox import Sandbox, TestCase,
Limits`, and what `__all__` names is what it may use.

A program runs in a worker that is jailed in one of these ways, strongest first; `Sandbox.isolation`
names the one in use. "auto" takes the first of the upper two that a probe shows to work here.
The lower two must be asked for by name.

  bubblewrap  Namespaces of its own (processes, network, IPC, host name; users unless root), a file
              system of the standard library alone, and everything below.
  landlock    No namespaces. Landlock allows reading the standard library and nothing else; seccomp
              forbids other processes, sockets and writes; limits hold CPU time, wall time, memory,
              threads, files and output. Not protected: path metadata (whether a file exists, its
              size) and the process numbers of the host are visible.
  seccomp     As landlock without Landlock: every file that the worker's user may read can be read.
  unsafe      The limits alone: no protection from hostile programs, so for trusted ones only.

None of them is a barrier against a hole in the kernel. Started by root, each worker runs under a
uid of its own (61000 to 64999); started by an ordinary user, under the user's. Nothing can be
written anywhere: /tmp is there, and empty. Expected outputs, other tests and reference solutions
never enter the jail of a judged program; nor does a check, which has a jail of its own.

  pool.py         `Sandbox`: a pool of warm workers, and what happens when one is lost
  jail_worker.py  the host's side of one worker: start, ask, end
  jail.py         the worker itself, a script inside the jail: one child for each test
  jail_filter.py  the system calls that a child may make
  verdict.py      the records: `TestCase`, `Limits`, `TestResult`, `Verdict`
  classify.py     what a child left behind -> a test's result
  compare.py      whether a program's answer is the expected one
  check_source.py what a check is: an author's program that judges another one
  checks.py       what crosses between a check and the judged program, each in its own jail
  json_values.py  JSON with integers longer than Python reads
  wording.py      the feedback text of a verdict

Nothing here imports jax or knows an environment.
"""

from sdpo_jax.sandbox.check_source import read_check
from sdpo_jax.sandbox.jail_worker import installed
from sdpo_jax.sandbox.pool import ISOLATIONS, Sandbox
from sdpo_jax.sandbox.verdict import (
  KINDS,
  Limits,
  ProgramError,
  TestCase,
  TestResult,
  Verdict,
  check_tests,
)

__all__ = [
  "ISOLATIONS",
  "KINDS",
  "Limits",
  "ProgramError",
  "Sandbox",
  "TestCase",
  "TestResult",
  "Verdict",
  "check_tests",
  "installed",
  "read_check",
]
