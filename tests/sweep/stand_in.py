"""Stands in for ``ttt``: writes down how it was called, and does what STAND_IN says of the point it is of.

STAND_IN is JSON: point to what it does at each start, an exit status or "hang" (until SIGTERM or SIGINT, as
``ttt train`` does; "hang hard" goes on even so). What is not said ends with 0.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
calls = workdir / "calls"
with calls.open("a") as file:
    call = {"arguments": sys.argv[1:], "pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    file.write(json.dumps(call) + "\n")
starts = len(calls.read_text().splitlines())
actions = json.loads(os.environ.get("STAND_IN", "{}")).get(workdir.name, [])
action = actions[starts - 1] if starts <= len(actions) else 0
with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": starts, "loss": 5.0 / starts, "tokens_per_second": 100.0}) + "\n")


def stopped(number, frame):
    print(f"stopped by {signal.Signals(number).name}", flush=True)
    if action == "hang":
        time.sleep(float(os.environ.get("STAND_IN_SAVES", 0.1)))
        sys.exit(75 if number == signal.SIGTERM else 130)


if str(action).startswith("hang"):
    signal.signal(signal.SIGTERM, stopped)
    signal.signal(signal.SIGINT, stopped)
    (workdir / "ready").write_text("")
    while True:
        time.sleep(0.02)
print("some output", flush=True)
if action:
    print(f"ttt train: status {action}\nwarnings of others", file=sys.stderr)
sys.exit(action)
