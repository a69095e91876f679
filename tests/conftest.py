"""Sets eight virtual CPU devices for every test, before jax is imported.

Programs that run once or twice on toy sizes are compiled in a hurry, and kept for the next session
of tests: a second one takes a third of the time. SDPO_JAX_TEST_CACHE names another directory for
them, or "off".
"""

import gc
import importlib.metadata
import os
import platform

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)

_VERSION = f"{importlib.metadata.version('jaxlib')}-{platform.python_version()}"
_CACHE = os.environ.get("SDPO_JAX_TEST_CACHE") or os.path.expanduser(
  f"~/.cache/sdpo_jax/tests/{_VERSION}-{platform.node()}"
)
if _CACHE == "off":
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
else:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402 - reads the variables above

# Files that compile models or start whole runs. All other tests are `quick`.
_COMPILING = set(
  "ahead assets attention beams bench_loss colabs configs counterfactual decoder diagnose "
  "discover distill_kl distill_kl_gpu distill_kl_topk distill_kl_tpu fluency gate hf_weights "
  "hindsight import_gguf linear_teachers local lora lora_run main memory mesh objectives plan "
  "pretrain processes remote_teacher report sandbox_cases schedules scripted serve server_runs "
  "tracked_run train_step transcripts turn_rows".split()
)


# Linux gives a process 65,530 mappings of memory, and each compiled program takes several. At the
# limit the compiler crashes.
_MOST_MAPPINGS = 25_000


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
  """Forgets compiled programs between files where a process has many."""
  yield
  try:
    with open("/proc/self/maps", "rb") as maps:
      count = sum(1 for _ in maps)
  except OSError:  # another system
    return
  if count > _MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items):
  """Marks the quick tests."""
  for item in items:
    is_slow = item.get_closest_marker("slow")
    if item.path.stem.removeprefix("test_") not in _COMPILING and not is_slow:
      item.add_marker(pytest.mark.quick)
