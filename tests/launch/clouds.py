"""A cloud that is a folder: gcloud and what is on hosts are stand-ins; ssh runs commands in folders of this machine."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "--config", str(ROOT / "configs" / "quickstart.py"), "--workdir", "gs://bucket/runs/a")
TRAIN += ("--config.data.batch_size=8",)
JOB = "ttt-a-537dbd"  # the name that it gets


class Cloud:
    """The folder, what shall happen in it (``script``), and what has."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.script = {
            "failures": {},  # by verb of gcloud: what its first calls print when they fail; "" for one that does not
            "lives": [["ACCEPTED", "ACTIVE"]],  # per creation: states that describe finds, the last one for ever
            "node": "READY",
            "hosts": 1,
            "runs": [0],  # per start on a host: what it does; by host where it is a dict
            "seconds": 0.05,  # that it does it in
        }
        text = (Path(__file__).parent / "stand_in_tpu.py").read_text()
        for program in ("bin/gcloud", "host/curl", "host/uv", "host/ttt"):
            (folder / program).parent.mkdir(exist_ok=True, parents=True)
            (folder / program).write_text(f"#!{sys.executable} -IS\n{text}")
            (folder / program).chmod(0o755)
        self.write()

    def write(self, **script) -> None:
        self.script.update(script)
        (self.folder / "script.json").write_text(json.dumps(self.script))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was done, in a word each; what only looks is left out."""
        words = []
        for call in self.calls():
            verb = call[call.index("tpus") + 2]
            if verb == "ssh":
                script = next(a for a in call if a.startswith("--command="))
                verb = re.search(r"worker\.sh (install|start|status|follow|tail|stop|end) ", script)[1]
            if verb not in ("describe", "status", "follow"):
                words.append(verb)
        return words

    @property
    def resource(self) -> dict | None:
        path = self.folder / "resource.json"
        return json.loads(path.read_text()) if path.exists() else None

    def home(self, host: int = 0, life: int = 1, node: str | None = None) -> Path:
        folder = self.folder / "machines" / str(life)
        return folder / (node or sorted(p.name for p in folder.iterdir())[0]) / str(host)

    def argv(self, start: int = 0, **where) -> list[str]:
        return json.loads((self.home(**where) / f"argv-{start}.json").read_text())

    def end(self) -> None:
        """Ends whatever still runs on hosts."""
        for pid in (self.folder / "machines").glob("*/*/*/ttt-launch/*/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
