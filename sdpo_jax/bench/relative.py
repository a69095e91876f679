"""Measures the time of a step of several methods relative to SDPO's.

This is what `python -m sdpo_jax.bench step --methods=...` does for each case, in a child process.
All methods have the same policy's texts. Each further reading has a prompt of its own, as long as
the teacher's. Steps are made in turns, one of each method a round, so that what else the machine
does meets all of them alike.

Units and definitions:

  readings      by the teacher, of each response
  time_s        shortest step, wall clock
  relative      median over the rounds of the method's wall time / SDPO's in the same round
  relative_cpu  the same of processor seconds, all threads; on a busy machine the one to trust
"""

import statistics
import time

# step.py imports this file, and what it shares is imported in the functions that use it

COLUMNS = ("case", "method", "readings", "time_s", "relative", "relative_cpu")


def rows(result: dict) -> list[dict]:
  """Returns a line of the table for each method of a case, or for a case that has failed."""
  if "error" in result:
    return [result]
  return [dict(case=result["case"], **figures) for figures in result["steps"]]


def measure(*, case, device, responses, micro_batches, remat, repeats, methods) -> dict:
  """Returns the request with the figures of SDPO and of each method, measured in this process."""
  request = dict(locals())
  import jax

  from sdpo_jax.bench.step import lengths_of, model_of

  shape, kind = case.split(":")
  model = model_of(shape, device)
  lengths = lengths_of(kind, responses)
  runs = {}
  for name in ("sdpo", *methods):
    runs[name] = _Run(name, model, lengths, micro_batches, remat, device)
  for run in runs.values():
    run()  # warms up
  wall_s, cpu_s = ({name: [] for name in runs} for _ in range(2))
  for _ in range(repeats):
    for name, run in runs.items():
      wall_start, cpu_start = time.perf_counter(), time.process_time()
      run()
      wall_s[name].append(time.perf_counter() - wall_start)
      cpu_s[name].append(time.process_time() - cpu_start)
  steps = []
  for name, run in runs.items():
    steps.append(
      dict(
        method=name,
        readings=run.readings,
        time_s=min(wall_s[name]),
        relative=_relative(wall_s[name], wall_s["sdpo"]),
        relative_cpu=_relative(cpu_s[name], cpu_s["sdpo"]),
      )
    )
  device_kind = jax.devices()[0].device_kind
  return request | dict(steps=steps, device_kind=device_kind, jax=jax.__version__)


class _Run:
  """A method's compiled step with its state and batch; a call makes one step."""

  def __init__(self, name, model, lengths, micro_batches, remat, device):
    from sdpo_jax.bench.step import OPTIMIZER, compiled_step, device_batch
    from sdpo_jax.objectives import build
    from sdpo_jax.optimizer import make_optimizer
    from sdpo_jax.train_step import make_signals

    method = build.build_method(build.method_row(name))
    tx = make_optimizer(**OPTIMIZER)
    signals = make_signals(model, method, remat=remat)
    self.readings = 1 + method.further_count if method.needs_teacher else 0
    self._batch = device_batch(
      model, method, lengths, micro_batches, device, further=method.further_count
    )
    self._state, self._step = compiled_step(model, method, tx, signals, self._batch)

  def __call__(self) -> None:
    import jax

    self._state, _ = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)


def _relative(times: list[float], of_sdpo: list[float]) -> float:
  return statistics.median(a / b for a, b in zip(times, of_sdpo, strict=True))
