# The inference servers beside a trainer on one node; gpu_node.sh sources it, after shared.sh. They
# share nothing: each has GPUs, a port, a process group and a log of its own. What gpu_node.sh reads
# from its flags and from the environment of GPUs is read here by the same names.
#
# shellcheck shell=bash
# shellcheck disable=SC2154  # gpu_node.sh sets them

SERVERS=()    # process ids, which are those of their groups too
WEIGHTS_MADE= # a directory of weights that was made here, and is removed
WEIGHTS_ROOT=${WEIGHTS_ROOT:-/dev/shm} # where it is made: a file system in memory
SERVER_GRACE_S=${SERVER_GRACE_S:-30}   # from TERM to KILL

server_url() { echo "http://127.0.0.1:$((port + $1))"; }
server_log() { echo "$logs/$server-$((port + $1)).log"; }
server_name() { echo "server $1 ($server on port $((port + $1)))"; }

# Asks a server, whatever proxies there are for other machines.
ask() { curl --silent --fail --max-time 10 --noproxy '*' "$@"; }

# Checks what can be checked before anything is started, and adds to the trainer's arguments what
# lets it sample from the servers. Its own arguments win: with --config.rollout.engine=local it does
# not, and the servers are for an environment that asks a model.
plan_servers() {
  ((servers > 0 && server_gpus > 0 && split > 0)) ||
    refuse "--servers=$servers with --server-gpus=$server_gpus of $gpus GPUs: each server and the" \
      "trainer need one"
  ((port + servers <= 65536)) || refuse "--port=$port leaves no room for $servers servers"
  case $server in
    vllm) health=health ;;
    sglang) health=health_generate ;; # it makes one token; /health answers while the model loads
    *) refuse "--server=$server is unknown; choose from none, vllm, sglang" ;;
  esac
  logs=${logs:-$(workdir_of_main)/servers}
  logs=${logs/#\~/$HOME} # as the trainer reads its work directory
  if [[ $server == vllm && $(workdir_of_main) == "$EXAMPLE_WORKDIR" ]]; then
    MAIN+=(--config.model.lora.rank=16) # of a dry run without arguments
  fi
  samples=1
  if [[ " ${MAIN[*]} " =~ " --config.rollout.engine"[=\ ]"local " ]]; then samples=; fi
  if [[ $samples ]]; then tell_trainer; fi
  ask_settings
}

# Names the servers and the directory of weights in the trainer's arguments.
tell_trainer() {
  local i urls=''
  for ((i = 0; i < servers; i++)); do urls+="'$(server_url "$i")',"; done
  if [[ $DRY_RUN && ! $weights ]]; then
    weights=$WEIGHTS_ROOT/sdpo_jax.XXXXXX
  elif [[ ! $weights ]]; then
    if [[ ! -w $WEIGHTS_ROOT ]]; then WEIGHTS_ROOT=${TMPDIR:-/tmp}; fi
    weights=$(mktemp -d "$WEIGHTS_ROOT/sdpo_jax.XXXXXX")
    WEIGHTS_MADE=$weights
  fi
  MAIN=(
    --config.rollout.engine="$server" --config.rollout.server.urls="($urls)"
    --config.rollout.server.weights_dir="$weights"
    # nobody starts a lost server again here
    --config.rollout.server.patience_s=60
    "${MAIN[@]}"
  )
  # else it has the name by which the run knows its model
  if [[ $server == vllm && $model ]]; then
    MAIN=(--config.rollout.server.model="$model" "${MAIN[@]}")
  fi
}

# Sets `model`, `served` (its name) and `needed` (flags) by the trainer's settings, which are checked
# on the way: a wrong one is found before minutes of loading.
ask_settings() {
  local status=0 answer
  answer=$(JAX_PLATFORMS=cpu python launch/server_settings.py "$server" "$model" "${MAIN[@]}") ||
    status=$?
  if ((status != 0)); then exit "$status"; fi
  mapfile -t needed <<<"$answer"
  model=${needed[0]} served=${needed[1]}
  needed=("${needed[@]:2}")
}

# server_command I: sets `serve`, the command of a server.
server_command() {
  local first=$((split + $1 * server_gpus))
  serve=(env "CUDA_VISIBLE_DEVICES=$(joined "${devices[@]:first:server_gpus}")")
  case $server in
    vllm)
      serve+=(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "${venv:+$venv/bin/}vllm" serve "$model")
      serve+=(--tensor-parallel-size "$server_gpus")
      if [[ $served != "$model" ]]; then serve+=(--served-model-name "$served"); fi
      ;;
    sglang)
      serve+=("${venv:+$venv/bin/}python" -m sglang.launch_server --model-path "$model")
      serve+=(--tp-size "$server_gpus")
      ;;
  esac
  serve+=(--host 127.0.0.1 --port $((port + $1)))
  serve+=(${needed[@]+"${needed[@]}"} ${server_flags[@]+"${server_flags[@]}"})
}

# Prints what start_servers does.
show_servers() {
  local i
  for ((i = 0; i < servers; i++)); do
    server_command "$i"
    show setsid "${serve[@]}"
    echo "# its log: $(server_log "$i"); until it answers, at most $ready_timeout s:"
    show curl --fail "$(server_url "$i")/$health"
    show curl --fail "$(server_url "$i")/v1/models"
  done
}

# Starts all servers and waits until each answers; returns 1 if one ended or took too long, 143 if
# this shell was asked to stop.
start_servers() {
  local i deadline=$((SECONDS + ready_timeout))
  for ((i = 0; i < servers; i++)); do
    if ask --output /dev/null "$(server_url "$i")/$health"; then
      say "something answers on port $((port + i)) already; choose another --port"
      return 1
    fi
  done
  mkdir -p "$logs"
  for ((i = 0; i < servers; i++)); do
    server_command "$i"
    setsid "${serve[@]}" >>"$(server_log "$i")" 2>&1 &
    SERVERS+=($!)
  done
  for ((i = 0; i < servers; i++)); do
    until ask --output /dev/null "$(server_url "$i")/$health"; do
      if [[ $STOPPING ]]; then return 143; fi
      servers_run || return 1
      if ((SECONDS >= deadline)); then
        say "$(server_name "$i") was not ready after $ready_timeout s (--ready-timeout);" \
          "its log: $(server_log "$i")"
        return 1
      fi
      pause "$POLL_S"
    done
    # others may be on this port, or a server of another model
    if ! ask "$(server_url "$i")/v1/models" | grep -qF "\"$served\""; then
      say "$(server_name "$i") answers, but does not serve $served; its log: $(server_log "$i")"
      return 1
    fi
    say "$(server_name "$i") is ready; its log: $(server_log "$i")"
  done
  servers_run || return 1
}

# Tells whether all servers run, and says which one does not.
servers_run() {
  local i status
  for i in "${!SERVERS[@]}"; do
    if kill -0 "${SERVERS[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${SERVERS[i]}" || status=$?
    say "$(server_name "$i") ended with status $status; its log: $(server_log "$i")"
    return 1
  done
}

# Ends the servers, all at a time, with the workers in their groups, and removes what they read.
stop_servers() {
  trap '' TERM INT HUP
  local pid enders=()
  for pid in ${SERVERS[@]+"${SERVERS[@]}"}; do
    end_group "$pid" "$SERVER_GRACE_S" &
    enders+=($!)
  done
  if ((${#enders[@]})); then wait "${enders[@]}"; fi
  if [[ $WEIGHTS_MADE ]]; then rm -rf "$WEIGHTS_MADE"; fi
}
