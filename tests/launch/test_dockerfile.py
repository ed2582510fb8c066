"""Check launch/Dockerfile without Docker: what it copies, what it installs, and what a container runs."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from stand_ins import ROOT

from ttt_jax.launch import versions

TEXT = re.sub(r"\\\n\s*|#.*\n", "", (ROOT / "launch/Dockerfile").read_text())
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", TEXT, re.MULTILINE | re.DOTALL))
COPIED = [source for sources in re.findall("^COPY (.*) ", TEXT, re.MULTILINE) for source in sources.split()]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def ignored(path: Path) -> bool:
    """Return whether .dockerignore leaves a file of the source tree out of the build."""
    parts = [part for each in (path, *path.parents) for part in (str(each), f"**/{each.name}")]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in IGNORED)


def test_a_target_for_each_platform_installs_its_extra():
    assert [*STAGES] == ["packages", "cpu", "cuda", "tpu"]
    for name, extras in (("cpu", "${EXTRAS}"), ("cuda", "cuda,${EXTRAS}"), ("tpu", "tpu,${EXTRAS}")):
        # The code comes after the packages, so that a change of it does not install them again.
        assert re.search(
            rf'^RUN .*pip install .*constraints.txt --editable "\.\[{re.escape(extras)}\]"\nCOPY', STAGES[name], re.M
        )
        assert not re.search("ENTRYPOINT|CMD", STAGES[name])  # ttt is process 1 and gets the signals
    assert '\nENTRYPOINT ["ttt"]\n' in STAGES["packages"]


def test_files_that_are_copied_exist_and_files_that_git_ignores_are_left_out():
    assert COPIED == ["setup.py", "constraints.txt", "ttt_jax/__init__.py", ".", ".", "."]
    assert all((ROOT / source).is_file() and not ignored(Path(source)) for source in COPIED[:3])
    needed = [path for path in versions.files(ROOT) if path.parts[0] in ("ttt_jax", "configs", "launch")]
    assert len(needed) > 100
    assert [path for path in needed if ignored(path)] == []
    for pattern in (".git/", *(ROOT / ".gitignore").read_text().splitlines()):
        path = Path(pattern.strip("/").replace("*", "x")) / "file"
        assert ignored(path), pattern
        assert pattern[0] in "/." or ignored("somewhere" / path), pattern


@pytest.mark.slow
def test_the_install_finds_the_code_that_is_copied_after_it(tmp_path):
    """Follow the first stage and the target cpu in a folder; setuptools comes from a package index, the rest from here."""
    tree, python = tmp_path / "ttt_jax", tmp_path / "venv/bin/python"

    def copy(paths):
        for path in paths:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tree / path)

    def output(*command, **options) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout.strip()

    copy(COPIED[:3])
    (tree / "README.md").touch()
    output(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = output(python, "-c", "import site; print(site.getsitepackages()[0])")
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    output(*pip, "install", "--no-deps", "--editable", ".", cwd=tree)
    copy(path for path in versions.files(ROOT) if not ignored(path))
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    program = "from ttt_jax.launch import versions; print(versions.__file__)"
    assert output(python, "-c", program, env=environment, cwd="/") == str(tree / "ttt_jax/launch/versions.py")
    (entrypoint,) = re.findall("^ENTRYPOINT (.*)", TEXT, re.MULTILINE)
    command = [*json.loads(entrypoint), "train", "--config", "configs/quickstart.py:nothing", "--workdir", "/runs/a"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ttt train: model.mixer='nothing': expected one of")
