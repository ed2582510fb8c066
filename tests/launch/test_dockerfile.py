"""Test launch/Dockerfile without Docker: what it copies and installs, and what a container would run."""

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

LINES = re.sub(r"\\\n\s*", "", (ROOT / "launch" / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]
STAGES: dict[str, list] = {"": []}  # the instructions of each stage, by its name
for _word, _rest in INSTRUCTIONS:
    STAGES.setdefault(_rest.split(" AS ")[1], []) if _word == "FROM" else STAGES[[*STAGES][-1]].append((_word, _rest))


def ignored(path: Path) -> bool:
    """Return whether .dockerignore leaves a file of the source tree out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return any(
        fnmatch.fnmatchcase(str(part), p) or (p[:3] == "**/" and fnmatch.fnmatchcase(part.name, p[3:]))
        for p in patterns
        for part in (path, *path.parents)
    )


def test_a_target_for_each_platform_installs_its_extra():
    assert [*STAGES][1:] == ["packages", "cpu", "cuda", "tpu"]
    for name, extras in (("cpu", "${EXTRAS}"), ("cuda", "cuda,${EXTRAS}"), ("tpu", "tpu,${EXTRAS}")):
        (install,) = (rest for word, rest in STAGES[name] if word == "RUN" and "pip install" in rest)
        assert f'--editable ".[{extras}]"' in install
        assert "constraints.txt" in install
        # The code comes after the packages, so that a change of it does not install them again.
        words = [word for word, _ in STAGES[name]]
        assert words.index("COPY") > words.index("RUN")
        # ttt is process 1 and gets the signals.
        assert not {"ENTRYPOINT", "CMD"} & {*words}
    assert ("ENTRYPOINT", '["ttt"]') in STAGES["packages"]


def test_files_that_are_copied_exist_and_files_that_git_ignores_are_left_out():
    copied = [source for word, rest in INSTRUCTIONS if word == "COPY" for source in rest.split()[:-1]]
    assert copied == ["setup.py", "constraints.txt", "ttt_jax/__init__.py", ".", ".", "."]
    assert all((ROOT / source).is_file() and not ignored(Path(source)) for source in copied[:3])
    needed = [path for path in versions.files(ROOT) if path.parts[0] in ("ttt_jax", "configs", "launch")]
    assert len(needed) > 100
    assert [path for path in needed if ignored(path)] == []
    for pattern in (ROOT / ".gitignore").read_text().splitlines():
        path = Path(pattern.strip("/").replace("*", "x"))
        assert ignored(path / "file"), pattern
        assert pattern[0] == "/" or ignored(Path("somewhere") / path / "file"), pattern
    assert ignored(Path(".git/config"))


@pytest.mark.slow
def test_the_install_finds_the_code_that_is_copied_after_it(tmp_path):
    """Follow the instructions of the first stage and of the target cpu, in a folder in the place of an image.

    Like every installation it needs a package index, for setuptools; the packages are those of this environment.
    """
    tree, venv = tmp_path / "ttt_jax", tmp_path / "venv"

    def copy(path):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)

    for source in ("setup.py", "constraints.txt", "ttt_jax/__init__.py"):
        copy(source)
    (tree / "README.md").touch()
    python = venv / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    program = "import site; print(site.getsitepackages()[0])"
    site = subprocess.check_output([python, "-c", program], text=True).strip()
    Path(site, "here.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--editable", "."], cwd=tree, check=True)
    for path in versions.files(ROOT):
        if not ignored(path):
            copy(path)
    environment = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    program = "from ttt_jax.launch import versions; print(versions.__file__)"
    found = subprocess.check_output([python, "-c", program], env=environment, cwd="/", text=True)
    assert found.strip() == str(tree / "ttt_jax/launch/versions.py")
    (entrypoint,) = (rest for word, rest in INSTRUCTIONS if word == "ENTRYPOINT")
    command = [*json.loads(entrypoint), "train", "--config", "configs/quickstart.py:nothing", "--workdir", "/runs/a"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ttt train: model.mixer='nothing': expected one of")
