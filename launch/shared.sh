# What the launch scripts share; it is sourced. Messages, printing or running a command, and the
# rule of which exit statuses of the trainer are started again:
#
#     0  done                             never
#     1  failed                           never
#     2  a wrong setting                  never
#   143  preempted, and saved             yes
#   134  jax aborted: a peer was lost     yes
#   137  killed                           only with several processes: it was the peer
#
# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this read its variables

MAX_RESTARTS=20  # default; a run that is preempted more often needs a person
DRY_RUN=         # not empty: commands are printed, and nothing is run
HEARD=0          # signals that a trap has counted, for await
EXAMPLE_WORKDIR=runs/example # of a dry run without arguments
POLL_S=${POLL_S:-1}                   # between two looks at a server or its trainer
RESTART_PAUSE_S=${RESTART_PAUSE_S:-5} # before the trainer is started again
CHILD=           # the process that `supervise` runs
STOPPING=        # not empty: it was asked to stop, and nothing is started again

# Prints one line on stderr, with the script's name.
say() { printf '%s: %s\n' "${SCRIPT:-${0##*/}}" "$*" >&2; }

# Refuses a command line: one line, status 2.
refuse() {
  say "$*"
  exit 2
}

# Prints the comment at the head of a script.
usage() { awk 'NR == 1 || /^#SBATCH/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$1"; }

# Refuses a flag whose value is no whole number.
whole_number() { [[ $2 =~ ^[0-9]+$ ]] || refuse "$1=$2: not a whole number"; }

# Refuses arguments of the trainer that a restart could not go on from. None at all are a dry run's:
# MAIN is then an example.
take_main_arguments() {
  MAIN=("$@")
  if [[ $DRY_RUN ]] && (($# == 0)); then
    MAIN=(--config=configs/tinycode.py --workdir="$EXAMPLE_WORKDIR")
  fi
  [[ " ${MAIN[*]-}" == *" --workdir"[=\ ]* ]] ||
    refuse "give the trainer's arguments after --, with a --workdir: a restart goes on from there"
}

# Prints the work directory that MAIN names.
workdir_of_main() {
  local i
  for ((i = 0; i < ${#MAIN[@]}; i++)); do
    case ${MAIN[i]} in
      --workdir=*) echo "${MAIN[i]#*=}" && return ;;
      --workdir) echo "${MAIN[i + 1]}" && return ;;
    esac
  done
}

# Prints a command such that a shell reads it back as it is.
show() {
  local word line='' quote="'\\''"
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/"$quote"}'"
    fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it.
run() {
  if [[ $DRY_RUN ]]; then show "$@"; else "$@"; fi
}

# may_restart STATUS PROCESSES: tells whether a run that ended so is started again.
may_restart() {
  case $1 in
    143 | 134) return 0 ;;
    137) (($2 > 1)) ;;
    *) return 1 ;;
  esac
}

# Waits for a child and returns its status. `wait` alone comes back when a trap has run, and says
# nothing about the child then: traps count HEARD.
await() {
  local before status
  while true; do
    before=$HEARD
    status=0
    wait "$1" || status=$?
    if ((HEARD == before)); then return "$status"; fi
  done
}

# Ends a process group: TERM, and KILL for what is still there after some seconds.
end_group() {
  local group=$1 seconds=$2 deadline=$((SECONDS + $2))
  kill -TERM -- "-$group" 2>/dev/null || return 0
  while kill -0 -- "-$group" 2>/dev/null; do
    if ((SECONDS >= deadline)); then
      say "group $group still runs after $seconds s: killed"
      kill -KILL -- "-$group" 2>/dev/null || true
      return 0
    fi
    sleep 0.2
  done
}

# Asks the command that `supervise` runs to stop. Only itself: it ends its own children when it has
# saved.
stop_child() {
  STOPPING=1
  if [[ $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi
}

# supervise MAX_RESTARTS PROCESSES COMMAND...: runs a command in its own process group, starts it
# again where the rule says so, and returns its last status. TERM, INT or HUP to this shell is
# passed on as TERM, and then nothing is started again. A function `check_peer`, if there is one, is asked
# from time to time; once it fails, the command is asked to stop as well.
supervise() {
  local most=$1 processes=$2 restarts=0 status=143
  shift 2
  trap 'HEARD=$((HEARD + 1)); stop_child' TERM INT HUP
  while [[ ! $STOPPING ]]; do
    setsid "$@" &
    CHILD=$!
    if [[ $STOPPING ]]; then stop_child; fi # the signal came before there was anybody to tell
    watch_child
    status=0
    await "$CHILD" || status=$?
    kill -KILL -- "-$CHILD" 2>/dev/null || true # what it left behind
    CHILD=''
    if [[ $STOPPING ]] || ! may_restart "$status" "$processes"; then break; fi
    if ((restarts >= most)); then
      say "status $status, and it was started again $restarts times already"
      break
    fi
    restarts=$((restarts + 1))
    say "status $status: started again ($restarts of at most $most)"
    pause "$RESTART_PAUSE_S"
  done
  trap - TERM INT HUP
  return "$status"
}

# Looks after the peer of a command while it runs.
watch_child() {
  if [[ $(type -t check_peer) != function ]]; then return 0; fi
  while [[ ! $STOPPING ]] && kill -0 "$CHILD" 2>/dev/null; do
    check_peer || stop_child
    pause "$POLL_S"
  done
}

# Sleeps, but not long past a signal: bash runs a trap when the command in front of it ends.
pause() {
  local seconds
  if [[ $1 == *.* ]]; then
    sleep "$1"
  else
    for ((seconds = 0; seconds < $1; seconds++)); do
      if [[ $STOPPING ]]; then break; fi
      sleep 1
    done
  fi
}
