#!/usr/bin/env bash
# Trains on one node, and starts the trainer again when it was preempted.
#
#   launch/gpu_node.sh [FLAG ...] -- ARGUMENTS OF sdpo_jax.main
#
# Call it at the top of the repository, with the Python environment of the run active.
#
#   --gpus=N             GPUs to use; default: all of CUDA_VISIBLE_DEVICES, else of nvidia-smi
#   --max-restarts=N     how often the trainer is started again after 143 or 134 (20)
#   --server=NAME        vllm or sglang: an inference server beside the trainer; default none
#   --server-gpus=N      its GPUs, the last ones (1); the trainer has the others
#   --server-model=DIR   what it serves: a directory or hub id
#   --server-venv=DIR    its Python environment; default: vllm or python from PATH
#   --server-flag=FLAG   one more flag of the server; repeatable
#   --port=N             where it listens on 127.0.0.1 (8000)
#   --ready-timeout=N    seconds it may take to load (1800)
#   --dry-run            prints the commands and runs nothing
#   --help
#
# The server runs in an environment of its own because its libraries and jax's exclude each other.
# Nothing tells the trainer about it: its arguments, or an environment's, name the address. If the
# server ends, the trainer is asked to save and stop.
#
# INT (Ctrl-C) or TERM asks the trainer to save and stop; then the server is ended. Exit status: the
# trainer's last one; 1 if the server failed.

set -euo pipefail
SCRIPT=gpu_node.sh
root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source=launch/shared.sh
. "$root/launch/shared.sh"

gpus='' max_restarts=$MAX_RESTARTS
server=none server_gpus=1 model='' venv='' port=8000 ready_timeout=1800
server_flags=()
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --server=*) server=${1#*=} ;;
    --server-gpus=*) server_gpus=${1#*=} ;;
    --server-model=*) model=${1#*=} ;;
    --server-venv=*) venv=${1#*=} ;;
    --server-flag=*) server_flags+=("${1#*=}") ;;
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

# Sets the commands of the server and of the trainer, and the address that tells that it is ready.
plan_commands() {
  trainer=(python -m sdpo_jax.main "${MAIN[@]}")
  if [[ $server == none && ! $gpus ]]; then return; fi # jax takes all that are visible
  find_gpus
  local split=$gpus
  if [[ $server != none ]]; then
    split=$((gpus - server_gpus))
    ((server_gpus > 0 && split > 0)) ||
      refuse "--server-gpus=$server_gpus of $gpus: the server and the trainer need one each"
  fi
  trainer=(env "CUDA_VISIBLE_DEVICES=$(joined "${devices[@]:0:split}")" "${trainer[@]}")
  if [[ $server == none ]]; then return; fi
  serve=(env "CUDA_VISIBLE_DEVICES=$(joined "${devices[@]:split:server_gpus}")")
  case $server in
    vllm)
      serve+=("${venv:+$venv/bin/}vllm" serve "$model" --tensor-parallel-size "$server_gpus")
      health=health
      ;;
    sglang)
      serve+=("${venv:+$venv/bin/}python" -m sglang.launch_server --model-path "$model")
      serve+=(--tp-size "$server_gpus")
      health=health_generate # it makes one token; /health alone answers while the model loads
      ;;
    *) refuse "--server=$server is unknown; choose from none, vllm, sglang" ;;
  esac
  serve+=(--host 127.0.0.1 --port "$port" ${server_flags[@]+"${server_flags[@]}"})
  probe=(curl --silent --fail --max-time 10 --noproxy '*' --output /dev/null)
  probe+=("http://127.0.0.1:$port/$health")
  names=(curl --silent --fail --max-time 10 --noproxy '*' "http://127.0.0.1:$port/v1/models")
}

server_runs() { kill -0 "$SERVER" 2>/dev/null; }

# Starts the server and waits until it answers; returns 1 if it ended or took too long.
start_server() {
  if "${probe[@]}"; then
    say "something answers on port $port already; choose another --port"
    return 1
  fi
  setsid "${serve[@]}" &
  SERVER=$!
  local deadline=$((SECONDS + ready_timeout))
  until "${probe[@]}"; do
    if [[ $STOPPING ]]; then return 143; fi
    if ! server_runs; then
      say "the server ended before it was ready"
      return 1
    elif ((SECONDS >= deadline)); then
      say "the server was not ready after $ready_timeout s (--ready-timeout)"
      return 1
    fi
    pause "$POLL_S"
  done
  if ! "${names[@]}" | grep -qF "\"$model\""; then
    say "the server answers, but does not serve $model"
    return 1
  fi
  say "the server is ready on http://127.0.0.1:$port"
}

# Ends the server's process group: its workers are in it.
# shellcheck disable=SC2329  # a trap calls it
stop_server() {
  trap '' TERM INT HUP
  if [[ $SERVER ]]; then end_group "$SERVER" 30; fi
}

plan_commands
if [[ $DRY_RUN ]]; then
  if [[ $server != none ]]; then
    show setsid "${serve[@]}"
    echo "# until it answers, at most $ready_timeout s:"
    show "${probe[@]}"
    show "${names[@]}"
  fi
  show setsid "${trainer[@]}"
  echo "# again after status 143 or 134, at most $max_restarts times"
  exit
fi

SERVER='' server_lost='' status=0
if [[ $server != none ]]; then
  command -v curl >/dev/null || refuse "curl is not installed, which asks the server"
  [[ $model ]] || refuse "--server=$server needs --server-model=DIR"
  trap stop_server EXIT
  trap 'HEARD=$((HEARD + 1)); stop_child' TERM INT HUP
  start_server || exit $?
  check_peer() {
    server_runs && return
    say "the server ended: the trainer is asked to save and stop"
    server_lost=1
    return 1
  }
fi
supervise "$max_restarts" 1 "${trainer[@]}" || status=$?
if [[ $server_lost ]]; then exit 1; fi
exit "$status"
