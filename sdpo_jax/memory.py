"""Host memory of a process that compiles."""

import contextlib
import ctypes

import jax


@contextlib.contextmanager
def released_by_the_compiler():
  """What a compilation of more than a second has freed goes back to the system: glibc keeps it, 0.5 GB after the train step of an eight-layer model."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none

  def ended(event: str, seconds: float, **_) -> None:
    if trim is not None and seconds > 1 and event.endswith("backend_compile_duration"):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(ended)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(ended)
