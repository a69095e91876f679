#!/usr/bin/env bash
# Trains on one node, and starts the trainer again when it was preempted. With --server, inference
# servers sample for it on GPUs of their own.
#
#   launch/gpu_node.sh [FLAG ...] -- ARGUMENTS OF sdpo_jax.main
#
# Call it at the top of the repository, with the Python environment of the run active.
#
#   --gpus=N             GPUs to use; default: all of CUDA_VISIBLE_DEVICES, else of nvidia-smi
#   --max-restarts=N     how often the trainer is started again after 143 or 134 (20)
#   --server=NAME        vllm or sglang: what samples; default none, the trainer itself
#   --servers=N          how many of them (1)
#   --server-gpus=N      GPUs of each, from the last ones on (1); the trainer has the others
#   --server-model=DIR   what they serve: a directory or hub id; default: the model of the run
#   --server-venv=DIR    their Python environment; default: vllm or python from PATH
#   --server-flag=FLAG   one more flag of each server; repeatable
#   --server-logs=DIR    where their logs are; default: servers/ in the work directory
#   --weights-dir=DIR    where the trainer hands weights over; default: a new one in /dev/shm
#   --port=N             the first one listens there, on 127.0.0.1, the others above it (8000)
#   --ready-timeout=N    seconds they may take to load (1800)
#   --dry-run            prints the commands and runs nothing
#   --help
#
# The servers run in an environment of their own because their libraries and jax's exclude each
# other. vLLM takes adapters: the run needs --config.model.lora.rank; SGLang takes all weights. The
# trainer is told of them by config.rollout; where its arguments say --config.rollout.engine=local,
# it samples by itself, and they are for an environment that asks a model. If a server ends, one line
# names it and its log, and the trainer is asked to save and stop. It cannot save while it waits for
# the only server there was: then it goes back to its last checkpoint.
#
# INT (Ctrl-C) or TERM asks the trainer to save and stop; then the servers are ended. Exit status:
# the trainer's last one; 1 if a server failed.

set -euo pipefail
SCRIPT=gpu_node.sh
root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source=launch/shared.sh
. "$root/launch/shared.sh"
# shellcheck source=launch/servers.sh
. "$root/launch/servers.sh"

gpus='' max_restarts=$MAX_RESTARTS
server=none servers=1 server_gpus=1 model='' venv='' logs='' weights='' port=8000 ready_timeout=1800
server_flags=()
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --server=*) server=${1#*=} ;;
    --servers=*) servers=${1#*=} ;;
    --server-gpus=*) server_gpus=${1#*=} ;;
    --server-model=*) model=${1#*=} ;;
    --server-venv=*) venv=${1#*=} ;;
    --server-flag=*) server_flags+=("${1#*=}") ;;
    --server-logs=*) logs=${1#*=} ;;
    --weights-dir=*) weights=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --ready-timeout=*) ready_timeout=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help) usage "$0" && exit ;;
    --) shift && break ;;
    *) refuse "unknown flag $1; --help lists them, and those of the trainer follow --" ;;
  esac
  shift
done
whole_number --max-restarts "$max_restarts"
whole_number --servers "$servers"
whole_number --server-gpus "$server_gpus"
whole_number --port "$port"
whole_number --ready-timeout "$ready_timeout"
take_main_arguments "$@"

# Sets `devices`, the GPUs to use.
find_gpus() {
  if [[ $gpus ]]; then
    whole_number --gpus "$gpus"
  elif [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
  elif [[ $DRY_RUN ]]; then
    gpus=8
  elif command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
  else
    refuse "how many GPUs there are is unknown: no nvidia-smi; give --gpus=N"
  fi
  IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
  ((${#devices[@]} >= gpus)) || refuse "--gpus=$gpus, but CUDA_VISIBLE_DEVICES has ${#devices[@]}"
  devices=("${devices[@]:0:gpus}")
}

# Joins words with commas.
joined() {
  local IFS=,
  echo "$*"
}

# Divides the GPUs and sets the command of the trainer.
plan_commands() {
  trainer=()
  if [[ $server != none || $gpus ]]; then # else jax takes all that are visible
    find_gpus
    split=$gpus
    if [[ $server != none ]]; then
      split=$((gpus - servers * server_gpus))
      plan_servers
    fi
    trainer=(env "CUDA_VISIBLE_DEVICES=$(joined "${devices[@]:0:split}")")
  fi
  trainer+=(python -m sdpo_jax.main "${MAIN[@]}")
}

trap stop_servers EXIT # before there is a directory or a process of theirs
plan_commands
if [[ $DRY_RUN ]]; then
  if [[ $server != none ]]; then show_servers; fi
  show setsid "${trainer[@]}"
  echo "# again after status 143 or 134, at most $max_restarts times"
  exit
fi

server_lost='' status=0
if [[ $server != none ]]; then
  command -v curl >/dev/null || refuse "curl is not installed, which asks the servers"
  trap 'HEARD=$((HEARD + 1)); stop_child' TERM INT HUP
  start_servers || exit $?
  check_peer() {
    servers_run && return
    say "the trainer is asked to save and stop"
    server_lost=1
    return 1
  }
fi
supervise "$max_restarts" 1 "${trainer[@]}" || status=$?
if [[ $server_lost ]]; then exit 1; fi
exit "$status"
