"""launch/Dockerfile, without Docker: what it copies, what it installs by, and what a container would run."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ttt_jax.launch import versions

ROOT = Path(__file__).resolve().parents[2]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "launch" / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]


def stages():
    """The instructions of each stage, by its name."""
    found, name = {}, ""
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        elif name:
            found[name].append((word, rest))
    return found


def ignored(path: Path) -> bool:
    """Whether .dockerignore leaves a file of the source tree out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    above = [path, *path.parents]
    return any(
        fnmatch.fnmatchcase(str(part), pattern)
        or (pattern[:3] == "**/" and fnmatch.fnmatchcase(part.name, pattern[3:]))
        for pattern in patterns
        for part in above
    )


def test_there_is_a_target_for_each_platform_that_installs_its_extra():
    installs = {
        name: [rest for word, rest in lines if word == "RUN" and "pip install" in rest]
        for name, lines in stages().items()
    }
    assert list(installs) == ["packages", "cpu", "cuda", "tpu"]
    assert installs["packages"] == []
    for name, extras in (("cpu", "${EXTRAS}"), ("cuda", "cuda,${EXTRAS}"), ("tpu", "tpu,${EXTRAS}")):
        (install,) = installs[name]
        assert f'--editable ".[{extras}]"' in install
        assert "constraints.txt" in install
        # The code comes after the packages, so that a change of it does not install them again.
        words = [word for word, _ in stages()[name]]
        assert words.index("COPY") > words.index("RUN")


def test_ttt_is_process_1_and_gets_the_signals():
    assert ("ENTRYPOINT", '["ttt"]') in stages()["packages"]
    assert not any(word in ("ENTRYPOINT", "CMD") for name in ("cpu", "cuda", "tpu") for word, _ in stages()[name])


def test_what_is_copied_is_there_and_what_git_ignores_is_left_out():
    copied = [source for _, rest in INSTRUCTIONS if _ == "COPY" for source in rest.split()[:-1]]
    assert copied == ["setup.py", "constraints.txt", "ttt_jax/__init__.py", ".", ".", "."]
    for source in copied[:3]:
        assert (ROOT / source).is_file()
        assert not ignored(Path(source))
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
    """The instructions of the first stage and of the target cpu, in a folder in the place of an image. Like every
    installation it needs a package index, for setuptools."""
    tree = tmp_path / "ttt_jax"
    (tree / "ttt_jax").mkdir(parents=True)
    for source in ("setup.py", "constraints.txt", "ttt_jax/__init__.py"):
        shutil.copy(ROOT / source, tree / source)
    (tree / "README.md").touch()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-deps"]
    # The packages themselves are those of this environment.
    site = Path(
        subprocess.check_output(
            [venv / "bin/python", "-c", "import site; print(site.getsitepackages()[0])"], text=True
        ).strip()
    )
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--editable", "."], cwd=tree, check=True)
    for path in versions.files(ROOT):
        if not ignored(path):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tree / path)
    environment = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    program = "import ttt_jax.launch.versions, sys; print(ttt_jax.launch.versions.__file__)"
    found = subprocess.check_output([venv / "bin/python", "-c", program], env=environment, cwd="/", text=True)
    assert found.strip() == str(tree / "ttt_jax/launch/versions.py")
    (entrypoint,) = (rest for word, rest in INSTRUCTIONS if word == "ENTRYPOINT")
    done = subprocess.run(
        [*json.loads(entrypoint), "train", "--config", "configs/quickstart.py:nothing", "--workdir", "/runs/a"],
        env=environment,
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ttt train: model.mixer='nothing': expected one of")
