"""What the compiler frees goes back to the system, while a run lasts and no longer."""

import ctypes

import jax
import jax.numpy as jnp

from sdpo_jax import session


def test_a_long_compilation_is_followed_by_a_trim(monkeypatch):
  trims, compiled = [], []
  library = type("Library", (), {"malloc_trim": staticmethod(trims.append)})
  monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
  listen = lambda event, seconds, **_: compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  # jax's own name for it
  event = next(e for e in compiled if e.endswith("backend_compile_duration"))
  with session.released_by_the_compiler():
    jax.monitoring.record_event_duration_secs(event, 0.5)
    assert trims == []
    jax.monitoring.record_event_duration_secs(event, 1.5)
    assert trims == [0]
  jax.monitoring.record_event_duration_secs(event, 1.5)
  assert trims == [0]


def test_a_c_library_without_it_is_left_alone(monkeypatch):
  monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
  with session.released_by_the_compiler():
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
