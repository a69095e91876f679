#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs, through queued resources of the Cloud TPU API.
#
#   launch/tpu_pod.sh COMMAND --zone=ZONE [FLAG ...] [-- ARGUMENTS OF sdpo_jax.main]
#
#   train    create, setup, run, and watch until the end; a Spot slice that was taken away is deleted
#            and created again, and the run goes on from its last checkpoint
#   create   asks for the slice and waits until it is ACTIVE
#   setup    copies the committed files of this repository to all workers, and installs them
#   run      starts the trainer on all workers; it outlives the connection
#   logs     prints the end of worker 0's log
#   status   prints the state of the slice, and of the run on each worker
#   stop     asks the trainer to save and leave; the slice stays
#   delete   gives the slice back
#
#   --name=NAME             of the request and its node (sdpo-jax)
#   --zone=ZONE             where
#   --type=TYPE             v5litepod-N, v6e-N (chips), v5p-N, v4-N (cores, two a chip) (v6e-16)
#   --spot                  cheaper, and may be taken away at any time
#   --max-recreations=N     train: how often a Spot slice is created again (10)
#   --max-restarts=N        how often the trainer is started again on a slice that stays (20)
#   --wait=DURATION         the request fails if there is no slice after that time (6h)
#   --create-flag=FLAG      one more flag of `create`, such as --create-flag=--project=P; repeatable
#   --poll=SECONDS          between two questions about the state (30)
#   --dry-run               prints the commands and runs nothing; without COMMAND, those of all
#   --help
#
# All workers need to see the work directory: a mounted bucket, or a file system. setup mounts none.
# Exit status of train: the trainer's; 1 if there was no slice.
#
# Google says of this API that it gets fixes alone. TPU7x and later exist only through GKE
# (launch/gke.sh has the older chips there) and Compute Engine.

set -euo pipefail
SCRIPT=tpu_pod.sh
root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source=launch/shared.sh
. "$root/launch/shared.sh"
EXAMPLE_WORKDIR=/mnt/runs/example

command='' name=sdpo-jax zone='' type=v6e-16 spot='' max_recreations=10 max_restarts=$MAX_RESTARTS
wait=6h poll=30
create_flags=()
if [[ ${1:-} && $1 != -* ]]; then
  command=$1
  shift
fi
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --spot) spot=1 ;;
    --max-recreations=*) max_recreations=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help) usage "$0" && exit ;;
    --) shift && break ;;
    *) refuse "unknown flag $1; --help lists them, and those of the trainer follow --" ;;
  esac
  shift
done
whole_number --max-recreations "$max_recreations"
whole_number --max-restarts "$max_restarts"
whole_number --poll "$poll"
[[ $name =~ ^[a-z][-a-z0-9]{0,60}$ ]] || refuse "--name=$name: lower-case letters, digits and -"

# Sets `runtime`, the image, and `hosts` from the accelerator type.
read_type() {
  local size=${type##*-}
  [[ $type == *-* && $size =~ ^[1-9][0-9]*$ ]] || refuse "--type=$type is no CHIP-NUMBER, like v6e-16"
  case ${type%-*} in
    v6e) runtime=v2-alpha-tpuv6e hosts=$((size > 8 ? size / 4 : 1)) ;;
    v5litepod) runtime=v2-alpha-tpuv5-lite hosts=$((size > 8 ? size / 4 : 1)) ;;
    v5p) runtime=v2-alpha-tpuv5 hosts=$((size > 8 ? size / 8 : 1)) ;;
    v4) runtime=tpu-ubuntu2204-base hosts=$((size > 8 ? size / 8 : 1)) ;;
    tpu7x*) refuse "--type=$type: TPU7x exists only through GKE and Compute Engine" ;;
    *) refuse "--type=$type is unknown; choose from v4-N, v5litepod-N, v5p-N, v6e-N" ;;
  esac
}

# Calls gcloud about queued resources, or about the slice's machines.
resources() { run gcloud compute tpus queued-resources "$@" --zone="$zone"; }
machines() { run gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
on_workers() { machines ssh "$name" --worker="$1" --command="$2"; }
worker_script() { printf 'bash sdpo_jax/launch/tpu_worker.sh %s' "$*"; }

# Prints the state of the request; nothing where gcloud fails.
state() { resources describe "$name" --format='value(state.state)' || true; }

create() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if [[ $spot ]]; then flags+=(--spot); fi
  resources create "$name" "${flags[@]}" --valid-until-duration="$wait" --quiet \
    ${create_flags[@]+"${create_flags[@]}"} || return 1
  wait_until_active
}

# Waits for ACTIVE; returns 1 for a state that does not lead there.
wait_until_active() {
  local now before='' unanswered=0
  if [[ $DRY_RUN ]]; then
    echo "# every $poll s, until it is ACTIVE; FAILED and SUSPENDED end the waiting:"
    state
    return
  fi
  while true; do
    now=$(state)
    if [[ $now != "$before" ]]; then say "$name is ${now:-unknown}"; fi
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
      '')
        unanswered=$((unanswered + 1))
        if ((unanswered >= 10)); then
          say "gcloud does not tell the state of $name"
          return 1
        fi
        ;;
      *) unanswered=0 ;;
    esac
    pause "$poll"
  done
}

setup() {
  local archive=$root/build/$name.tar.gz attempt
  run mkdir -p "$root/build" || return 1
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD || return 1
  for attempt in 1 2 3; do # the machines may refuse ssh for a moment after they are ACTIVE
    if machines scp "$archive" "$name:sdpo_jax.tar.gz" --worker=all; then break; fi
    if ((attempt == 3)); then return 1; fi
    pause "$poll"
  done
  on_workers all "mkdir -p sdpo_jax && tar -xzf sdpo_jax.tar.gz -C sdpo_jax && $(worker_script setup)"
}

start_run() {
  local arguments=("${MAIN[@]}")
  if ((hosts > 1)); then arguments+=(--distributed=auto); fi
  on_workers all "$(worker_script run "$max_restarts" "$hosts" "$(show "${arguments[@]}")")"
}

# Watches a run. Returns the trainer's status, or 75 once the slice was taken away.
watch() {
  local status again=0 missing=0
  while true; do
    pause "$poll"
    case $(state) in
      SUSPENDING | SUSPENDED | FAILED | DELETING) return 75 ;;
    esac
    status=$(on_workers 0 "$(worker_script status)" | tail -n 1) || status=
    if [[ $status == none ]]; then # the machine was restarted, say
      missing=$((missing + 1))
      if ((missing >= 3)); then return 1; fi
    elif [[ ! $status =~ ^[0-9]+$ ]]; then
      continue # it runs, or ssh failed, and then the state tells
    elif ! may_restart "$status" 2; then
      return "$status"
    else # it ended as one whose machine is taken away does: the state follows within minutes
      again=$((again + 1))
      if ((again >= 10)); then return "$status"; fi
    fi
  done
}

train() {
  local recreations=0 status
  while true; do
    if ! { create && setup && start_run; }; then
      say "no run: the slice is missing or could not be set up; '$SCRIPT delete' gives it back"
      return 1
    fi
    if [[ $DRY_RUN ]]; then
      echo "# every $poll s, until worker 0 prints an exit status:"
      state
      on_workers 0 "$(worker_script status)"
      return
    fi
    status=0
    watch || status=$?
    if ((status != 75)); then break; fi
    if [[ ! $spot ]] || ((recreations >= max_recreations)); then
      say "the slice was taken away; it was created again $recreations times"
      return 1
    fi
    recreations=$((recreations + 1))
    say "the slice was taken away: created again ($recreations of at most $max_recreations)"
    delete || return 1
  done
  say "the run ended with status $status; the slice stays until '$SCRIPT delete --zone=$zone'"
  return "$status"
}

show_status() {
  state
  on_workers all "$(worker_script status)"
}

# without --force a request is deleted only when its nodes are gone
delete() { resources delete "$name" --force --quiet; }

call() {
  case $1 in
    create) create ;;
    setup) setup ;;
    run) start_run ;;
    train) train ;;
    logs) on_workers 0 "$(worker_script logs)" ;;
    status) show_status ;;
    stop) on_workers all "$(worker_script stop)" ;;
    delete) delete ;;
    *) refuse "unknown command '$1'; --help lists them" ;;
  esac
}

read_type
if [[ $DRY_RUN ]]; then
  zone=${zone:-ZONE}
else
  [[ $command ]] || refuse "give a command; --help lists them"
  [[ $zone ]] || refuse "--zone is missing"
  command -v gcloud >/dev/null || refuse "gcloud is not installed; --dry-run prints the commands"
fi
if [[ $command == run || $command == train || ! $command ]]; then take_main_arguments "$@"; fi
if [[ $command ]]; then
  call "$command"
else
  for command in create setup run logs status stop delete; do
    echo "# $command"
    call "$command"
  done
fi
