#!/usr/bin/env bash
# One task of slurm.sh, which calls it: slurm_task.sh GPUS COMMAND...
#
# It names the task's GPUs to jax, which would take one alone, passes TERM on, and makes statuses
# comparable: srun returns the highest one of all tasks, but a task that failed (1) or refused its
# settings (2) says more than its peers, which jax aborts (134). So 1 becomes 201 and 2 becomes 202.

set -euo pipefail
# shellcheck source=launch/shared.sh
. "${BASH_SOURCE[0]%/*}/shared.sh"

gpus=$1
shift
if ((gpus > 0)); then
  first=$((SLURM_LOCALID * gpus))
  JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

"$@" &
child=$!
# Slurm signals the tasks it started (cgroups) or all their descendants too (linuxproc): the
# command gets TERM once or twice.
trap 'HEARD=$((HEARD + 1)); kill -TERM "$child" 2>/dev/null' TERM
status=0
await "$child" || status=$?
case $status in
  1 | 2) exit $((200 + status)) ;;
  *) exit "$status" ;;
esac
