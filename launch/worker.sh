#!/usr/bin/env bash
# What `ttt launch tpu` runs on every host of a slice, over ssh. A job lives in ~/ttt-launch/NAME:
#
#   source-HASH/   the source tree; this file is in it
#   venv/          Python and all packages, in the versions of constraints.txt of the tree
#   installed      what is in venv, written last
#   env            variables of the command
#   lock           held while a command runs
#   run            the newest run; runs/RUN/ has its log, pid, status ("75 1700000000": exit status, when) and, when
#                  somebody asked it to stop, stopped
#
#   worker.sh install NAME PYTHON EXTRAS   makes venv; quick where it is there
#   worker.sh start NAME RUN ARGUMENTS...  runs `ttt ARGUMENTS...`, and returns; not where something runs already
#   worker.sh status NAME                  a line: ttt-worker WORKER RUN none|running|exited|lost STATUS WHEN
#   worker.sh follow NAME RUN BYTES        the log from there on, until the run ends
#   worker.sh tail NAME RUN LINES          the end of the log
#   worker.sh stop NAME SECONDS            SIGTERM, and SIGKILL where that does not help within so many seconds
#   worker.sh end NAME SECONDS             the same; its status does not say that somebody asked for it
set -euo pipefail

verb="$1" name="$2"
shift 2
source_tree="$(cd "$(dirname "$0")/.." && pwd)"
job="$HOME/ttt-launch/$name"
mkdir -p "$job/runs"

install() {
    local wanted="$source_tree $*"
    if [ -f "$HOME/$name.env" ]; then
        chmod 600 "$HOME/$name.env"
        mv -f "$HOME/$name.env" "$job/env"
    fi
    if [ "$(cat "$job/installed" 2>/dev/null)" != "$wanted" ]; then
        rm -f "$job/installed"
        bash "$source_tree/launch/install.sh" "$job/venv" "$@"
        echo "$wanted" >"$job/installed"
    fi
}

start() {
    local run="$1" folder="$job/runs/$1"
    shift
    exec 9>"$job/lock"
    if ! flock --wait 2 9; then
        return # it runs already: this is a second attempt, or somebody else was faster
    fi
    if ! mkdir "$folder" 2>/dev/null; then
        return # it has run already
    fi
    echo "$run" >"$job/run"
    # The lock goes on to the new process, and ends with it. A session of its own outlives this ssh connection.
    setsid nohup bash "$0" supervise "$name" "$folder" "$@" </dev/null >>"$folder/log" 2>&1 &
    for _ in $(seq 200); do # until it has left this session, whose end could take it along
        [ ! -s "$folder/pid" ] || return 0
        sleep 0.05
    done
}

supervise() {
    local folder="$1" status=0 pid
    shift
    # A machine that is shut down sends SIGTERM to all processes; the command saves, and this one waits for it.
    trap : TERM
    cd "$source_tree"
    if [ -f "$job/env" ]; then
        # shellcheck source=/dev/null
        source "$job/env"
    fi
    PYTHONUNBUFFERED=1 PATH="$job/venv/bin:$PATH" "$job/venv/bin/ttt" "$@" 9>&- &
    pid=$!
    echo "$pid" >"$folder/pid"
    while true; do
        status=0
        wait "$pid" || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    echo "$status $(date +%s)" >"$folder/status.new"
    mv "$folder/status.new" "$folder/status"
}

runs() {
    ! flock --shared --nonblock "$job/lock" true
}

worker() {
    curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || hostname
}

status() {
    local run state=lost ended=""
    run="$(cat "$job/run" 2>/dev/null || echo -)"
    if [ "$run" = - ]; then
        state=none
    elif runs; then
        state=running
    elif [ -f "$job/runs/$run/status" ]; then
        state=exited
        ended="$(cat "$job/runs/$run/status")"
        if [ -f "$job/runs/$run/stopped" ]; then
            ended="130 ${ended#* }"
        fi
    fi
    echo "ttt-worker $(worker) $run $state $ended"
}

follow() {
    tail --bytes="+$(($2 + 1))" --follow --sleep-interval=0.2 "$job/runs/$1/log" &
    trap "kill $!" EXIT
    flock --shared "$job/lock" true # until the command has ended
    sleep 0.5
}

stop() {
    local seconds="$1" run pid deadline
    run="$(cat "$job/run" 2>/dev/null || echo -)"
    if [ "$run" = - ] || ! runs; then
        return
    fi
    if [ "$verb" = stop ]; then
        touch "$job/runs/$run/stopped"
    fi
    deadline=$((SECONDS + seconds))
    until pid="$(cat "$job/runs/$run/pid" 2>/dev/null)"; do
        sleep 0.1
        [ "$SECONDS" -lt "$deadline" ] || return 0
    done
    kill -TERM "$pid" 2>/dev/null || true
    while runs && [ "$SECONDS" -lt "$deadline" ]; do
        sleep 0.2
    done
    if runs; then
        kill -KILL "$pid" 2>/dev/null || true
    fi
}

case "$verb" in
install | start | supervise | status | follow | stop) "$verb" "$@" ;;
end) stop "$@" ;;
tail) tail --lines="$2" "$job/runs/$1/log" ;;
*)
    echo "worker.sh: $verb: unknown" >&2
    exit 2
    ;;
esac
