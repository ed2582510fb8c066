#!/usr/bin/env bash
# What `ttt launch tpu` runs on every host of a slice, over ssh. A job lives in ~/ttt-launch/NAME:
#
#   source-HASH/   the source tree; this file is in it
#   venv/          Python and all packages, in the versions of launch-constraints.txt of the tree
#   installed      what is in venv, written last
#   env            variables of the command
#   lock           held while a command runs
#   run            the newest run; runs/RUN/ has its log, pid, status ("75 1700000000": exit status, when) and, when
#                  somebody asked it to stop, stopped
set -euo pipefail

verb="$1" name="$2"
shift 2
source_tree="$(cd "$(dirname "$0")/.." && pwd)"
job="$HOME/ttt-launch/$name"
mkdir -p "$job/runs"
newest="$(cat "$job/run" 2>/dev/null || echo -)"

is_running() { ! flock --shared --nonblock "$job/lock" true; }

case "$verb" in
install) # NAME PYTHON EXTRAS: makes venv, unless it is up to date
    if [ -f "$HOME/$name.env" ]; then
        chmod 600 "$HOME/$name.env" && mv -f "$HOME/$name.env" "$job/env"
    fi
    if [ "$(cat "$job/installed" 2>/dev/null)" != "$source_tree $*" ]; then
        rm -f "$job/installed"
        bash "$source_tree/launch/install.sh" "$job/venv" "$@"
        echo "$source_tree $*" >"$job/installed"
    fi
    ;;
start) # NAME RUN ARGUMENTS...: starts `ttt ARGUMENTS...` and returns; no second command, and no run twice
    folder="$job/runs/$1"
    exec 9>"$job/lock"
    flock --wait 2 9 && mkdir "$folder" 2>/dev/null || exit 0
    echo "$1" >"$job/run"
    # The lock goes on to the new process, and ends with it. A session of its own outlives this ssh connection.
    setsid nohup bash "$0" supervise "$name" "$folder" "${@:2}" </dev/null >>"$folder/log" 2>&1 &
    # Stay until it has left this session, whose end could take it along.
    for _ in {1..200}; do [ -s "$folder/pid" ] || sleep 0.05; done
    ;;
supervise) # NAME FOLDER ARGUMENTS...: runs `ttt ARGUMENTS...` and writes its status
    folder="$1"
    # A machine that is shut down sends SIGTERM to all processes; the command saves, and this one waits for it.
    trap : TERM
    cd "$source_tree"
    # shellcheck source=/dev/null
    [ ! -f "$job/env" ] || source "$job/env"
    PYTHONUNBUFFERED=1 PATH="$job/venv/bin:$PATH" "$job/venv/bin/ttt" "${@:2}" 9>&- &
    pid=$!
    echo "$pid" >"$folder/pid"
    while wait "$pid"; status=$?; kill -0 "$pid" 2>/dev/null; do :; done # signals end wait early
    [ ! -f "$folder/stopped" ] || status=130
    echo "$status $(date +%s)" >"$folder/status.new"
    mv "$folder/status.new" "$folder/status"
    ;;
status) # NAME: prints ttt-worker WORKER RUN none|running|exited|lost STATUS WHEN
    state=lost ended=""
    if [ "$newest" = - ]; then
        state=none
    elif is_running; then
        state=running
    elif ended="$(cat "$job/runs/$newest/status" 2>/dev/null)"; then
        state=exited
    fi
    worker="$(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || hostname)"
    echo "ttt-worker $worker $newest $state $ended"
    ;;
follow) # NAME RUN BYTES: prints the log after so many bytes, until the run ends
    tail --bytes="+$(($2 + 1))" --follow --sleep-interval=0.2 "$job/runs/$1/log" &
    tail=$!
    trap 'kill "$tail"' EXIT
    flock --shared "$job/lock" true # until the command has ended
    sleep 0.5
    ;;
tail) tail --lines="$2" "$job/runs/$1/log" ;; # NAME RUN LINES: prints the end of the log
stop | end) # NAME SECONDS: sends SIGTERM, and SIGKILL after so many seconds; after stop, the status is 130
    [ "$newest" != - ] && is_running || exit 0
    [ "$verb" = end ] || touch "$job/runs/$newest/stopped"
    until pid="$(cat "$job/runs/$newest/pid" 2>/dev/null)" || ! is_running; do sleep 0.1; done
    kill -TERM "$pid" 2>/dev/null || true
    flock --shared --timeout "$1" "$job/lock" true || kill -KILL "$pid" 2>/dev/null || true
    ;;
*) echo "worker.sh: $verb: unknown" >&2 && exit 2 ;;
esac
