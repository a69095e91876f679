"""Sets eight virtual CPU devices for every test, before jax is imported.

Programs that run once or twice on toy sizes are compiled in a hurry, and kept for the next session
of tests: a second one takes a third of the time. SDPO_JAX_TEST_CACHE names another directory for
them, or "off".
"""

import importlib.metadata
import os
import platform

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
