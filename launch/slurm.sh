#!/usr/bin/env bash
#SBATCH --job-name=sdpo_jax
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Trains under Slurm: one process a node with all its GPUs. It submits itself.
#
#   launch/slurm.sh [FLAG ...] -- ARGUMENTS OF sdpo_jax.main
#
# Call it at the top of the repository, with the Python environment of the run active. The work
# directory must be seen by all nodes.
#
#   --nodes=N            nodes (1)
#   --gpus=N             GPUs a node (8); 0 trains on the CPU
#   --tasks-per-node=N   processes a node (1), which divide its GPUs
#   --time=LIMIT         the time limit as Slurm writes it (24:00:00)
#   --max-restarts=N     how often the job is put back into the queue (20)
#   --sbatch=FLAG        one more flag of sbatch, such as --sbatch=--partition=h100; repeatable
#   --srun=FLAG          one more flag of srun, such as --srun=--container-image=PATH; repeatable
#   --server=NAME        vllm or sglang: inference servers beside the trainer, on the one node of the
#                        job; with it, --servers, --server-*, --weights-dir, --port and
#                        --ready-timeout as in gpu_node.sh, which then runs in the job
#   --dry-run            prints the commands of submission and job, and runs nothing
#   --help
#
# Five minutes before the limit the trainer gets TERM, saves and exits 143; the job then goes back
# into the queue (scontrol requeue), as it does when a process was lost. `scancel --signal=TERM JOB`
# asks for the same at any time. `scancel JOB` saves and does not requeue; Slurm kills the job after
# KillWait (30 s). Nothing is requeued after a failure or a wrong setting.
#
# `sbatch [FLAGS OF sbatch] launch/slurm.sh [FLAG ...] -- ARGUMENTS` works too; the flags of sbatch
# then say how many nodes, tasks a node and GPUs there are.

set -euo pipefail
SCRIPT=slurm.sh
in_job=
# Slurm runs its own copy of a batch script, under this name
if [[ ${SLURM_JOB_ID:-} && ${0##*/} == slurm_script ]]; then in_job=1; fi
if [[ $in_job ]]; then root=$PWD; else root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd); fi
if [[ ! -f $root/launch/shared.sh ]]; then
  echo "$SCRIPT: no launch/shared.sh in $root: submit at the top of the repository" >&2
  exit 2
fi
# shellcheck source=launch/shared.sh
. "$root/launch/shared.sh"

nodes=1 gpus=8 tasks=1 limit=24:00:00 max_restarts=$MAX_RESTARTS
sbatch_flags=() srun_flags=() server_flags=()
flags=()
while (($#)); do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --help) usage "$root/launch/slurm.sh" && exit ;;
    --) shift && break ;;
    *) flags+=("$1") ;;&
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --tasks-per-node=*) tasks=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --sbatch=*) sbatch_flags+=("${1#*=}") ;;
    --srun=*) srun_flags+=("${1#*=}") ;;
    --server=* | --servers=* | --server-*=* | --weights-dir=* | --port=* | --ready-timeout=*)
      server_flags+=("$1")
      ;;
    *) refuse "unknown flag $1; --help lists them, and those of the trainer follow --" ;;
  esac
  shift
done
for pair in nodes:"$nodes" gpus:"$gpus" tasks-per-node:"$tasks" max-restarts:"$max_restarts"; do
  whole_number "--${pair%%:*}" "${pair#*:}"
done
((nodes > 0 && tasks > 0)) || refuse "--nodes and --tasks-per-node must be positive"
take_main_arguments "$@"

submit() {
  local command=(
    sbatch --chdir="$root" --nodes="$nodes" --ntasks-per-node="$tasks" --time="$limit"
    --exclusive --mem=0
  )
  if ((gpus > 0)); then command+=(--gpus-per-node="$gpus"); fi
  run "${command[@]}" ${sbatch_flags[@]+"${sbatch_flags[@]}"} "$root/launch/slurm.sh" \
    ${flags[@]+"${flags[@]}"} -- "${MAIN[@]}"
}

# plan_job CPUS: sets the commands of the job from the numbers of nodes, tasks and GPUs.
plan_job() {
  ((gpus % tasks == 0)) || refuse "$gpus GPUs a node cannot be divided by $tasks tasks a node"
  processes=$((nodes * tasks))
  on_all=(
    srun --nodes="$nodes" --ntasks-per-node="$tasks" --cpus-per-task="$1"
    # peers are left to jax, which says what happened; killed ones would hide the status
    --kill-on-bad-exit=0 --wait=300
    ${srun_flags[@]+"${srun_flags[@]}"} bash launch/slurm_task.sh $((gpus / tasks))
  )
  preflight=(
    timeout 900 "${on_all[@]}" python launch/preflight.py $((gpus ? gpus / tasks : 1)) "$processes"
  )
  trainer=("${on_all[@]}" python -m sdpo_jax.main "${MAIN[@]}")
  if ((processes > 1)); then trainer+=(--distributed=auto); fi
  if ((${#server_flags[@]})); then plan_node "$1"; fi
}

# plan_node CPUS: sets `trainer` to the script that starts servers beside it; the job starts it again.
plan_node() {
  ((processes == 1)) ||
    refuse "servers run beside the one trainer of one node: use --nodes=1 --tasks-per-node=1, or" \
      "start them yourself and name them in config.rollout.server.urls"
  node=(launch/gpu_node.sh --gpus="$gpus" --max-restarts=0 "${server_flags[@]}" -- "${MAIN[@]}")
  # its processes have other GPUs each, and none joins others: no ids of devices are named
  trainer=(srun --nodes=1 --ntasks-per-node=1 --cpus-per-task="$1" --kill-on-bad-exit=0 --wait=300)
  trainer+=(${srun_flags[@]+"${srun_flags[@]}"} bash launch/slurm_task.sh 0 bash "${node[@]}")
}

# Checks flags and settings before the job waits in the queue.
check_node() {
  (cd "$root" && unset CUDA_VISIBLE_DEVICES && bash "${node[0]}" --dry-run "${node[@]:1}") >/dev/null
}

# Runs a step of the job and returns the status that decides.
run_step() {
  local status=0
  "$@" &
  await $! || status=$?
  case $status in
    201 | 202) return $((status - 200)) ;;
    *) return "$status" ;;
  esac
}

# Ends the job, or puts it back into the queue.
finish() {
  local status=$1 restarts=${SLURM_RESTART_COUNT:-0}
  if ! may_restart "$status" "$processes"; then
    exit "$status"
  elif [[ $cancelled ]]; then
    say "status $status after the job was cancelled or preempted: not requeued here"
  elif ((restarts >= max_restarts)); then
    say "status $status, and the job was requeued $restarts times already (--max-restarts)"
  else
    say "status $status: requeued ($((restarts + 1)) of at most $max_restarts)"
    scontrol requeue "$SLURM_JOB_ID" || say "scontrol requeue failed"
  fi
  exit "$status"
}

run_job() {
  local status=0
  nodes=$SLURM_JOB_NUM_NODES
  tasks=$((SLURM_NTASKS / nodes))
  if ((gpus > 0)); then gpus=${SLURM_GPUS_ON_NODE:-$gpus}; fi
  plan_job $((SLURM_CPUS_ON_NODE / tasks))
  cancelled=
  trap 'HEARD=$((HEARD + 1)); cancelled=1' TERM # steps get the warning, this script only a cancel
  run_step "${preflight[@]}" || status=$?
  if ((status != 0)); then
    say "the preflight ended with status $status"
    finish "$status"
  fi
  run_step "${trainer[@]}" || status=$?
  finish "$status"
}

if [[ $in_job ]]; then run_job; fi
if [[ ! $DRY_RUN ]]; then
  command -v sbatch >/dev/null || refuse "sbatch is not installed here; --dry-run prints the commands"
fi
plan_job CPUS
if ((${#server_flags[@]})); then check_node || exit $?; fi
submit
if [[ $DRY_RUN ]]; then
  echo "# in the job; CPUS is SLURM_CPUS_ON_NODE divided by the tasks of a node:"
  show "${preflight[@]}"
  show "${trainer[@]}"
  echo "# after 143, 134 or, of several processes, 137, at most $max_restarts times:"
  # shellcheck disable=SC2016
  echo 'scontrol requeue "$SLURM_JOB_ID"'
fi
