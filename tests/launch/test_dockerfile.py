"""Check launch/Dockerfile without Docker: what it copies, what it installs, and what a container runs."""

import fnmatch
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from stand_ins import ROOT

from ttt_jax.launch import sources

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
        install = f'pip install .*constraints.txt --editable "{re.escape(f".[{extras}]")}"\nCOPY'
        assert re.match(f"RUN .*{install}", STAGES[name])
        assert not re.search("ENTRYPOINT|CMD", STAGES[name])
    assert '\nENTRYPOINT ["ttt"]\n' in STAGES["packages"]  # ttt is process 1 and gets the signals


def test_files_that_are_copied_exist_and_files_that_git_ignores_are_left_out():
    assert COPIED == ["setup.py", "constraints.txt", "ttt_jax/__init__.py", ".", ".", "."]
    assert all((ROOT / source).is_file() and not ignored(Path(source)) for source in COPIED[:3])
    needed = [path for path in sources.files(ROOT) if path.parts[0] in ("ttt_jax", "configs", "launch")]
    assert len(needed) > 100
    assert not any(map(ignored, needed))
    for pattern in ("/.git/", *(ROOT / ".gitignore").read_text().splitlines()):
        path = Path(pattern.strip("/").replace("*", "x")) / "file"
        assert ignored(path), pattern
        assert pattern[0] == "/" or ignored("somewhere" / path), pattern


@pytest.mark.slow
def test_the_install_finds_the_code_that_is_copied_after_it(tmp_path):
    """Follow the stages packages and cpu in a folder. A package index has to provide setuptools and nothing else."""
    tree, venv = tmp_path / "ttt_jax", tmp_path / "venv"

    def copy(paths):
        for path in paths:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tree / path)

    copy(COPIED[:3])
    (tree / "README.md").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = venv / f"lib/python{sources.PYTHON}/site-packages"
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--editable", "."], cwd=tree, check=True)
    copy(path for path in sources.files(ROOT) if not ignored(path))
    options = {"env": {"PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}, "text": True}
    program = "from ttt_jax.launch import sources; print(sources.__file__)"
    found = subprocess.check_output([venv / "bin/python", "-c", program], cwd="/", **options)
    assert found.strip() == str(tree / "ttt_jax/launch/sources.py")
    command = ["ttt", "train", "--config", "configs/quickstart.py:nothing", "--workdir", "/runs/a"]
    done = subprocess.run(command, cwd=tree, capture_output=True, **options)
    assert done.returncode == 2
    assert done.stderr.startswith("ttt train: model.mixer='nothing': expected one of")
