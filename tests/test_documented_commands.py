"""Check that what the documents name exists: commands, options, config keys, files, links and Python names.

How a document is read:

- Commands stand in indented blocks, in fenced blocks that are not Python or a diff, and in inline code. A command is
  what follows the word ``ttt`` or ``python -m ttt_jax``, up to the next shell operator; a loop, an assignment or
  ``srun`` in front of it is left out. A line that ends with a backslash is continued by the next. A comment begins with
  `` #``.
- ``...`` stands for arguments that are left out. A command with it, or in inline code, may lack required options.
- Placeholders (:data:`PLACEHOLDERS`) are replaced first. All other paths, names and numbers are taken as they stand.
- A config is built by the real parser from the files of this repository; a command that is given without its config
  gets that of the quick start.
- Words such as ``model.ttt.unroll`` or ``--config.model.ttt.unroll=4`` in inline code are keys of the config, and
  ``ttt_jax.ttt.scan.run`` is a module or a name that is defined in one.
"""

import argparse
import ast
import contextlib
import functools
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ttt_jax import cli
from ttt_jax import config as config_lib
from ttt_jax.cli import bench
from ttt_jax.config import tree
from ttt_jax.errors import ConfigError
from ttt_jax.settings import parse as parse_value
from ttt_jax.sweep import points

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "configs/quickstart.py"
PLACEHOLDERS = {
    "--config ...": "...",
    "$mixer": "ttt_linear",
    "$i": "0",
    "$rungs": "--config configs/ablation.py:learned_w0",
    "gated_average": "ttt_linear",  # the mixer that CONTRIBUTING.md adds
    "bilinear": "swiglu",  # the learner that it adds
    "mylab.learners:gated": "swiglu",  # a learner of the reader
    "TARGET [options]": "slurm --nodes 1",
    "TARGET": "slurm",
    "VERB": "train",
    "--context N": "--context 2k",
    "--processes N --process I": "--processes 2 --process 0",
}
NOT_KEYS = re.compile(r"(config|metrics)\.jsonl?|(data|model)\.(py|md)|.*\.(jsonl|zst|gz)")


class Code(NamedTuple):
    """A piece of code of a document; ``inline`` where it stands within a line of text."""

    text: str
    inline: bool


def pieces(document: str) -> Iterator[Code]:
    """Yield the code of a document: the lines of its blocks, with their continuations, and its inline code."""
    text = re.sub(r"```(python|diff)\n.*?```", "", document, flags=re.DOTALL)
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^(?: {4}|\t).*\n)+", text, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield Code(re.sub(r"(^|\s)#.*", "", line).strip(), inline=False)
    prose = re.sub(r"^(?: {4}|\t).*\n", "", text, flags=re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        yield Code(" ".join(code.split()), inline=True)


def commands(code: Code) -> Iterator[tuple[list[str], bool]]:
    """Yield the arguments of each command of ttt in a piece of code, and whether some are left out."""
    text = code.text
    for name, value in PLACEHOLDERS.items():
        text = text.replace(name, value)
    if not re.search(r"(^|\s)(ttt|python3? -m ttt_jax) ", text):
        return
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words = list(lexer)
    for start, word in enumerate(words):
        if word != "ttt" and words[max(0, start - 1) : start + 1] != ["-m", "ttt_jax"]:
            continue
        rest = words[start + 1 :]
        end = next((i for i, each in enumerate(rest) if re.fullmatch("[;&|<>]+", each)), len(rest))
        if rest[:end]:
            yield [each for each in rest[:end] if each != "..."], code.inline or "..." in rest[:end]


def check_command(arguments: list[str], partial: bool) -> None:
    """Parse a command, and build the config that it names.

    Raises:
      ConfigError: where the command or its config is wrong.
    """
    message, made = io.StringIO(), parsers(partial)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(message):
        patch.setattr(cli, "parsers", lambda: made)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                options, rest = cli.parse(arguments)
        except SystemExit as end:
            if end.code == 0:  # --help
                return
            raise ConfigError(message.getvalue().strip().splitlines()[-1]) from None
    if options.verb == "bench tpu-schedule" and (options.function or not partial):
        check_function(options.function, options.set) if options.function else None
        for variant in options.compare or [""]:
            bench.target_of(options, rest, variant)
    elif options.verb == "sweep":
        check_sweep(options, rest, partial)
    elif options.takes_config:
        check_config(rest, partial)
    if options.command:
        check_command(options.command, partial or options.verb == "sweep")


@functools.cache
def parsers(partial: bool) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parsers of ``ttt``; of partial commands, all options and arguments may be left out."""
    parser, verbs = cli.parsers()
    for each in verbs.values() if partial else ():
        require_nothing(each)
    return parser, verbs


def require_nothing(parser: argparse.ArgumentParser) -> None:
    """Let all options and arguments of a parser, and of those within it, be left out."""
    for group in parser._mutually_exclusive_groups:
        group.required = False
    for action in parser._actions:
        action.required = False
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                require_nothing(each)


def check_config(arguments: list[str], partial: bool) -> None:
    """Build a config, from the quick start's file where a partial command names none."""
    if partial and not any(re.match("--?config(=|$)", each) for each in arguments):
        arguments = ["--config", QUICKSTART, *arguments]
    config_lib.from_arguments(arguments)


def check_sweep(options, arguments: list[str], partial: bool) -> None:
    """Build the config of each recipe of a sweep, and read its axes."""
    for key in points.combinations(options.grid, options.zip, {})[0]:
        check_key(key)
    recipes = [value for key, value in itertools.pairwise(arguments) if key == "--config"]
    constants = [each for each in arguments if each.startswith("--config.")]
    assert len(arguments) == 2 * len(recipes) + len(constants), arguments
    for recipe in recipes or [QUICKSTART] * partial:
        config_lib.from_arguments(["--config", recipe, *constants])


def check_function(named: str, settings: list[str]) -> None:
    """Check that the function of ``--function`` is defined, and takes the settings of ``--set``."""
    module, _, name = named.partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    functions = {node.name: node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise ConfigError(f"{named}: no such function")
    known = {argument.arg for argument in functions[name].args.args}
    if unknown := {each.partition("=")[0] for each in settings} - known:
        raise ConfigError(f"{named}: no setting {', '.join(unknown)}")


def check_key(word: str) -> None:
    """Check a key of the config, with the type of its value where it has one."""
    key, equals, text = re.sub("^--(no)?config[.]", "", word).partition("=")
    if any(known.startswith(f"{key}.") for known in config_lib.settings()):  # a section
        return
    setting = tree.setting(key, text)
    if equals and not re.fullmatch(r"[A-Z]+|\.\.\.", text):
        parse_value(word, setting.kind, text)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def defined(name: str) -> bool:
    """Return whether a dotted name is a module of this repository or is defined at the top of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:length])
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if not path.is_file():
            continue
        if length == len(parts):
            return True
        found = set()
        for node in tree_of(path).body:
            found |= {getattr(node, "name", "")} | {alias.asname or alias.name for alias in getattr(node, "names", ())}
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found |= {each.id for target in targets for each in ast.walk(target or node) if isinstance(each, ast.Name)}
        return parts[length] in found
    return False


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems(document: str, folder: Path = ROOT) -> list[str]:
    """Return what is wrong in a document, a line each; ``folder`` is where its relative links begin."""
    found = []
    sections = {key.split(".")[0] for key in config_lib.settings()}
    keys = re.compile(rf"--(no)?config[.](?!KEY)\w.*|({'|'.join(sections)})[.]\w[\w.]*(=.*)?[,;:]?")
    for code in pieces(document):
        try:
            for arguments, partial in commands(code):
                check_command(arguments, partial)
            if not code.inline and code.text.startswith("--config"):
                check_config(shlex.split(code.text), partial=True)
            for word in code.text.split() if code.inline else ():
                if keys.fullmatch(word) and not NOT_KEYS.fullmatch(word):
                    check_key(word.rstrip(",;:"))
        except (ConfigError, ValueError) as error:
            found.append(f"{code.text}: {error}")
        for name in re.findall(r"(?<![\w./-])ttt_jax(?:\.\w+)+", code.text):
            if not defined(name):
                found.append(f"{name}: not defined")
    without_code = re.sub(r"```(python|diff)\n.*?```", "", document, flags=re.DOTALL)
    for path in re.findall(r"(?<![\w./:-])(?:ttt_jax|docs|configs|scripts|tests|launch)/[\w./*-]+", without_code):
        if not list(ROOT.glob(path.rstrip("./"))):
            found.append(f"{path}: no such file")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document):
        path, _, anchor = link.partition("#")
        target = folder / path if path else None
        if target is not None and not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and target is not None and anchor not in anchors(target):
            found.append(f"{link}: no such heading")
    return found


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(document):
    assert problems(document.read_text(), document.parent) == []


def test_commands_are_found_in_every_document_that_shows_some():
    found = {path.name: sum(len(list(commands(code))) for code in pieces(path.read_text())) for path in DOCUMENTS}
    assert found["README.md"] >= 20
    assert sum(found.values()) >= 150


@pytest.mark.parametrize(
    "text",
    [
        "    ttt eval --workdr runs/a\n",
        "    ttt eval\n",
        "    ttt evil --workdir runs/a\n",
        "Use `ttt plot loss --output a.png`.\n",
        "Use `ttt eval --windows 3`.\n",
        "    ttt train --config configs/quickstart.py --workdir a \\\n        --config.model.widht=3\n",
        "    ttt train --config configs/quickstart.py:no_mixer --workdir a\n",
        "    ttt train --config configs/quickstart.py --workdir a --config.model.width=wide\n",
        "    ttt train ... --config.optimizer.lr=1e-3\n",
        "    ttt launch slurm --nodes 1 -- train --config configs/none.py --workdir a\n",
        "    ttt sweep --config configs/quickstart.py --grid model.size=1,2 --workdir a\n",
        "    ttt bench tpu-schedule --function ttt_jax.benchmark.inner_loop:build --set head=3\n",
        "    ttt bench tpu-schedule --config configs/benchmark.py --compare model.ttt.unrol=1 model.ttt.unroll=4\n",
        "The key `model.ttt.unrol` and the rest.\n",
        "Set `--config.model.ttt.unroll=often`.\n",
        "The function `ttt_jax.ttt.scan.walk` and the rest.\n",
        "The file `ttt_jax/ttt/scam.py`.\n",
        "[A link](docs/none.md).\n",
        "[A link](docs/plan.md#no-such-heading).\n",
    ],
)
def test_mistakes_are_found(text):
    assert problems(text)


def test_words_that_are_no_commands_are_left_alone():
    assert problems("A ttt layer.\n\n    ttt train --help  # ttt train --wrong\n\n```python\nttt wrong\n```\n") == []
