"""Runs programs that nobody trusts. This file is the door: what it names is what others may use."""

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
]
