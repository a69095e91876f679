"""Checks, before a run, that every process has the devices that were asked for.

  python launch/preflight.py DEVICES_PER_PROCESS PROCESSES

Several processes join as `--distributed=auto` does, and pass one value round, so that a network
that does not work is found here. Exit status: 0, or 2 with one line.
"""

import collections
import sys

import jax
from jax.experimental import multihost_utils


def main(argv: list[str]) -> int:
  devices, processes = map(int, argv[1:])
  if processes > 1:
    jax.distributed.initialize()
  # every process knows the devices of all: they agree on the verdict, and leave together
  found = collections.Counter(device.process_index for device in jax.devices())
  wrong = {rank: found[rank] for rank in range(processes) if found[rank] != devices}
  if wrong or len(found) != processes:
    if jax.process_index() == 0:
      print(
        f"preflight: {processes} processes with {devices} devices each were asked for; "
        f"jax sees {dict(sorted(found.items()))} (devices by process)",
        file=sys.stderr,
      )
    return 2
  multihost_utils.sync_global_devices("preflight")
  if jax.process_index() == 0:
    kind = jax.devices()[0].device_kind
    print(f"preflight: {processes} processes with {devices} devices each ({kind})", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
