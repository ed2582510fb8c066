"""Stand in for ``ttt``: write down how it was called, and do what STAND_IN says of the point.

STAND_IN is JSON: a point's action at each of its starts, an exit status by default 0; "hang" until SIGTERM or SIGINT,
as ``ttt train`` does; "hang hard", which continues even so; or "steps": train 40 steps, with higher losses for higher
seeds, slowly at the first start of those.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
calls, metrics = workdir / "calls", workdir / "metrics.jsonl"
with calls.open("a") as file:
    call = {"arguments": sys.argv[1:], "pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    file.write(json.dumps(call) + "\n")
starts = len(calls.read_text().splitlines())
actions = json.loads(os.environ.get("STAND_IN", "{}")).get(workdir.name, [])
action = actions[starts - 1] if starts <= len(actions) else 0


def stop(number, frame):
    print(f"stopped by {signal.Signals(number).name}", flush=True)
    if action != "hang hard":
        time.sleep(float(os.environ.get("STAND_IN_SAVES", 0.1)))
        sys.exit(75 if number == signal.SIGTERM else 130)


if isinstance(action, str):
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
if action == "steps":
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    print("continuing at", done, flush=True)
    seed = int(workdir.name.removeprefix("seed="))
    for step in range(done + 1, 41):
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "loss": 5.0 + seed - step / 100}) + "\n")
        time.sleep(0.15 if seed and not done else 0.01)
elif isinstance(action, str):
    (workdir / "ready").write_text("")
    while True:
        time.sleep(0.02)
else:
    print("some output", flush=True)
    if action:
        print(f"ttt train: status {action}\nwarnings of others", file=sys.stderr)
    sys.exit(action)
