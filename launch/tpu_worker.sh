#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker of a slice, by ssh, in the home directory:
#
#   bash sdpo_jax/launch/tpu_worker.sh setup
#   bash sdpo_jax/launch/tpu_worker.sh run MAX_RESTARTS HOSTS ARGUMENTS OF sdpo_jax.main
#   bash sdpo_jax/launch/tpu_worker.sh logs | status | stop
#
# `run` returns at once; the trainer outlives the connection. It leaves run.log, run.pid (of what
# looks after it) and, at its end, run.status (its exit status).

set -euo pipefail
SCRIPT=tpu_worker.sh
# shellcheck source=launch/shared.sh
. "${BASH_SOURCE[0]%/*}/shared.sh"

runs() { [[ -e ~/run.pid ]] && kill -0 "$(<~/run.pid)" 2>/dev/null; }

# The image's own Python may be older than jax needs: uv brings one.
setup() {
  sudo apt-get update -qq || true
  sudo apt-get install -y -qq python3-pip bubblewrap tmux >/dev/null ||
    say "apt-get failed: without bubblewrap the sandbox is weaker"
  python3 -m pip install --user --quiet uv
  ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv
  ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e "$HOME/sdpo_jax[tpu]"
}

start() {
  if runs; then refuse "a run is in progress on $(hostname), process $(<~/run.pid)"; fi
  rm -f ~/run.status
  cd ~/sdpo_jax
  nohup setsid bash launch/tpu_worker.sh look_after "$@" >>~/run.log 2>&1 </dev/null &
  echo $! >~/run.pid
}

look_after() {
  local status=0 most=$1 hosts=$2
  shift 2
  supervise "$most" "$hosts" ~/venv/bin/python -m sdpo_jax.main "$@" || status=$?
  echo "$status" >~/run.status
  return "$status"
}

# Prints the trainer's exit status, or "running", or "none" where no run was started or it vanished.
tell_status() {
  if [[ -e ~/run.status ]]; then
    cat ~/run.status
  elif runs; then
    echo running
  else
    echo none
  fi
}

command=${1:-}
shift || true
case $command in
  setup) setup ;;
  run) start "$@" ;;
  look_after) look_after "$@" ;;
  logs) tail -n 100 ~/run.log ;;
  status) tell_status ;;
  stop) if runs; then kill -TERM "$(<~/run.pid)"; fi ;;
  *) refuse "unknown command '$command'" ;;
esac
