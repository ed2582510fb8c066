"""Stands in for ``ttt``: 40 steps, with losses that are higher the higher the seed is. SIGTERM ends it with 75.

What is to be stopped early takes its time, but not when it goes on.
"""

import json
import signal
import sys
import time
from pathlib import Path

workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
seed = int(workdir.name.removeprefix("seed="))
path = workdir / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0


def stopped(number, frame):
    print("stopped by", signal.Signals(number).name, flush=True)
    sys.exit(75)


signal.signal(signal.SIGTERM, stopped)
print("going on at", done, flush=True)
with path.open("a", buffering=1) as file:
    for step in range(done + 1, 41):
        file.write(json.dumps({"step": step, "loss": 5.0 + seed - step / 100}) + "\n")
        time.sleep(0.15 if seed and not done else 0.01)
