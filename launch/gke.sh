#!/usr/bin/env bash
# Trains on GKE: fills gke_jobset.yaml (TPUs) or gke_jobset_gpu.yaml and applies it.
#
#   launch/gke.sh [COMMAND] [FLAG ...] [-- ARGUMENTS OF sdpo_jax.main]
#
#   apply    starts the run (default)
#   status   shows the JobSet and its pods
#   logs     prints the end of every pod's log
#   delete   ends the run: the pods get SIGTERM and the grace period, and save
#
#   --name=NAME              of the JobSet (sdpo-jax)
#   --image=IMAGE            with this package, and bubblewrap if possible
#   --chip=CHIP              v5e, v6e, v5p or gpu (v6e)
#   --topology=AxB[xC]       of the slice (4x4; v5p: 2x2x2); hosts follow from it
#   --hosts=N                gpu: nodes (1)
#   --gpus=N                 gpu: GPUs a node (8)
#   --accelerator=LABEL      gpu: the nodes' cloud.google.com/gke-accelerator (nvidia-h100-80gb)
#   --spot                   on Spot nodes
#   --queue=NAME             a Kueue LocalQueue that admits the run
#   --claim=NAME             a PersistentVolumeClaim, mounted on /runs; all pods write to it
#   --service-account=NAME   of the pods, for those who write to a bucket
#   --max-restarts=N         how often the JobSet starts again (20)
#   --grace=SECONDS          between SIGTERM and SIGKILL (300); Spot nodes give 15 s whatever it is
#   --dry-run                prints the command with the filled file, and runs nothing
#   --help
#
# It starts again where a pod was evicted, was preempted and saved (143), was aborted because it lost
# a peer (134) or was killed. A wrong setting (2) or a failure (1) ends it at once.

set -euo pipefail
SCRIPT=gke.sh
root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source=launch/shared.sh
. "$root/launch/shared.sh"
EXAMPLE_WORKDIR=/runs/example

command=apply name=sdpo-jax image='' chip=v6e topology='' hosts='' gpus='' accelerator=''
spot='' queue='' claim='' service_account='' max_restarts=$MAX_RESTARTS grace=300
if [[ ${1:-} && $1 != -* ]]; then
  command=$1
  shift
fi
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --chip=*) chip=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --spot) spot=true ;;
    --queue=*) queue=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help) usage "$0" && exit ;;
    --) shift && break ;;
    *) refuse "unknown flag $1; --help lists them, and those of the trainer follow --" ;;
  esac
  shift
done

# Sets `accelerator`, `hosts` and `chips` (of a host) of a slice; GKE knows these topologies.
read_slice() {
  local known size
  case $chip in
    v5e) accelerator=tpu-v5-lite-podslice known='2x4 4x4 4x8 8x8 8x16 16x16' ;;
    v6e) accelerator=tpu-v6e-slice known='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16' ;;
    v5p) accelerator=tpu-v5p-slice known='2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8' ;;
    *) refuse "--chip=$chip is unknown; choose from v5e, v6e, v5p, gpu" ;;
  esac
  if [[ ! $topology ]]; then
    topology=4x4
    if [[ $chip == v5p ]]; then topology=2x2x2; fi
  fi
  [[ " $known " == *" $topology "* ]] || refuse "--topology=$topology is none of $chip: $known"
  size=$((${topology//x/*}))
  chips=$((size < 4 ? size : 4))
  hosts=$((size / chips))
}

# Does the same for GPU nodes.
read_nodes() {
  accelerator=${accelerator:-nvidia-h100-80gb} hosts=${hosts:-1} chips=${gpus:-8}
  whole_number --hosts "$hosts"
  whole_number --gpus "$chips"
  ((hosts > 0 && chips > 0)) || refuse "--hosts and --gpus must be positive"
}

check_flags() {
  whole_number --max-restarts "$max_restarts"
  whole_number --grace "$grace"
  # pods are called NAME-workers-0-7-abcde, and a host's name has 63 letters
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name: at most 40 lower-case letters, digits and -"
  local value
  for value in "$image" "$queue" "$claim" "$service_account" "$accelerator"; do
    [[ $value =~ ^[-A-Za-z0-9./:@_]*$ ]] || refuse "'$value' cannot be a name here"
  done
  if [[ $chip == gpu ]]; then
    [[ ! $topology ]] || refuse "--topology is for TPUs; give --hosts and --gpus"
    read_nodes
  else
    [[ ! $hosts$gpus$accelerator ]] || refuse "--hosts, --gpus and --accelerator are for --chip=gpu"
    read_slice
  fi
}

# Refuses a work directory that a new pod would not find again.
check_workdir() {
  if [[ $claim ]]; then
    [[ " ${MAIN[*]}" == *" --workdir"[=\ ]/runs/* ]] || refuse "--claim=$claim needs --workdir=/runs/..."
  else
    [[ " ${MAIN[*]}" == *" --workdir"[=\ ]/mnt/* ]] ||
      refuse "a new pod would not find the work directory: give --claim=NAME and --workdir=/runs/...," \
        "or --workdir=/mnt/... where nodes mount a bucket or a disk there"
  fi
}

# Prints words as a list in JSON, which is YAML too. Kubernetes would expand $(NAME) in them; the
# last one may ask for that.
json_list() {
  local word list=''
  for word; do
    [[ $word != *[[:cntrl:]]* ]] || refuse "an argument holds a control character"
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    list+=", \"$word\""
  done
  printf '[%s]' "${list#, }"
}

trainer_command() {
  local words=(python -m sdpo_jax.main "${MAIN[@]//\$(/\$\$(}")
  if ((hosts > 1)); then
    if [[ $chip == gpu ]]; then # jax asks Kubernetes only where its client is installed
      # shellcheck disable=SC2016  # Kubernetes puts the rank there
      words+=("--distributed=$name-workers-0-0.$name:8476,$hosts,"'$(RANK)')
    else
      words+=(--distributed=auto)
    fi
  fi
  json_list "${words[@]}"
}

# Prints the filled template.
render() {
  local template=$root/launch/gke_jobset.yaml line key value restarted='[134, 143]'
  if [[ $chip == gpu ]]; then template=$root/launch/gke_jobset_gpu.yaml; fi
  if ((hosts > 1)); then restarted='[134, 137, 143]'; fi # with peers, a killed one is a lost one
  local -A values=(
    [NAME]=$name [QUEUE]=$queue [MAX_RESTARTS]=$max_restarts [HOSTS]=$hosts
    [CHIPS]=$chips [RESTARTED]=$restarted [GRACE]=$grace [SERVICE_ACCOUNT]=$service_account
    [ACCELERATOR]=$accelerator [TOPOLOGY]=$topology [SPOT]=$spot [IMAGE]=${image:-IMAGE}
    [CLAIM]=$claim [COMMAND]=$main_command
  )
  while IFS= read -r line; do
    if [[ $line =~ @([A-Z_]+)@ ]]; then
      key=${BASH_REMATCH[1]}
      value=${values[$key]}
      if [[ ! $value ]]; then continue; fi
      line=${line%%@*}$value${line##*@}
    fi
    printf '%s\n' "$line"
  done < <(sed '1,2d' "$template")
}

apply() {
  local filled main_command # plain assignments: a refusal inside ends the script
  main_command=$(trainer_command)
  filled=$(render)
  if [[ $DRY_RUN ]]; then
    printf "kubectl apply -f - <<'END'\n%s\nEND\n" "$filled"
  else
    kubectl apply -f - <<<"$filled"
  fi
}

check_flags
if [[ ! $DRY_RUN ]]; then
  command -v kubectl >/dev/null || refuse "kubectl is not installed; --dry-run prints the commands"
fi
selector=jobset.sigs.k8s.io/jobset-name=$name
case $command in
  apply)
    if [[ $DRY_RUN ]] && (($# == 0)); then claim=${claim:-runs}; fi
    take_main_arguments "$@"
    check_workdir
    [[ $image || $DRY_RUN ]] || refuse "--image is missing"
    apply
    ;;
  status)
    run kubectl get jobset "$name" -o wide
    run kubectl get pods --selector="$selector" -o wide
    ;;
  logs) run kubectl logs --selector="$selector" --prefix --tail=100 --max-log-requests=256 ;;
  delete) run kubectl delete jobset "$name" ;;
  *) refuse "unknown command '$command'; choose from apply, status, logs, delete" ;;
esac
