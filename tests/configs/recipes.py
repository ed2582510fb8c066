"""Read all recipes of ``configs/``, and write the file that remembers what each sets beside the defaults.

python tests/configs/recipes.py      # writes tests/configs/recipes.json; review the difference
"""

import functools
import json
from collections.abc import Collection
from pathlib import Path

from ttt_jax import config as config_lib
from ttt_jax.config.files import executed
from ttt_jax.mixers import MIXERS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GOLDEN = Path(__file__).with_name("recipes.json")


def names_of(path):
    """Return the names that a config file defines, with their values."""
    with executed(path) as names:
        return names


PAPER, ABLATION, TASKS, ATTENTION = (
    names_of(CONFIGS / name) for name in ("paper.py", "ablation.py", "tasks.py", "attention.py")
)


@functools.cache
def get(name, *overrides):
    """Return the validated config of ``FILE:ARG``, with overrides as on the command line.

    It is made once: callers must not change it.
    """
    return config_lib.from_arguments(["--config", str(CONFIGS / name), *overrides])


def paper_recipes() -> list[str]:
    return [
        f"{mixer}-{size}-{dataset}-{context}"
        for mixer in PAPER["MIXERS"]
        for size in PAPER["SIZES"]
        for dataset in PAPER["DATASETS"]
        for context in PAPER["CONTEXTS"]
        if not (mixer == "transformer_finetune" and context in ("1k", "2k"))
    ]


def attention_recipes() -> list[str]:
    """Return the recipes of attention.py that are not those of paper.py, for two contexts."""
    mixers = [f"{mixer}{shared}" for mixer in ATTENTION["MIXERS"] for shared in ("", "_gqa")]
    return [
        f"{mixer}-{size}-{rest}"
        for mixer in mixers
        if mixer not in PAPER["MIXERS"]
        for size in PAPER["SIZES"]
        for rest in ("books-8k", "pile-32k")
    ]


def all_recipes(mixers: Collection[str] = MIXERS) -> list[str]:
    return [
        *(f"quickstart.py:{mixer}" for mixer in mixers),
        *(f"benchmark.py:{mixer}" for mixer in mixers),
        *(f"books.py:{mixer}{tokens}" for mixer in mixers for tokens in ("", ",bpe")),
        *(f"paper.py:{recipe}" for recipe in paper_recipes()),
        *(f"paper.py:{mixer}-125m-books-8k:smoke" for mixer in PAPER["MIXERS"]),
        *(f"attention.py:{recipe}" for recipe in attention_recipes()),
        *(f"attention.py:{recipe}:smoke" for recipe in attention_recipes() if recipe.endswith("125m-books-8k")),
        *(f"tasks.py:{task},{mixer}" for task in TASKS["_TASKS"] for mixer in TASKS["_MIXERS"]),
        *(f"tiny.py:{recipe}" for recipe in paper_recipes() if recipe.endswith(("pile-2k", "books-32k"))),
        *(f"tiny.py:{rung}" for rung in ABLATION["RUNGS"]),
        *(f"ablation.py:{rung}{variant}" for rung in ABLATION["RUNGS"] for variant in ("", ":smoke")),
    ]


def dump(mixers: Collection[str] = MIXERS) -> dict:
    """Return the defaults, and the keys in which each recipe differs, without those of mixers that it does not use."""
    known = {name: MIXERS[name].section for name in mixers}
    others = {mixer.section for mixer in MIXERS.values() if mixer.section} - set(known.values())

    def tree(config) -> dict:
        found = config.to_dict()
        found["model"] = {key: value for key, value in found["model"].items() if key not in others}
        return found

    default = tree(config_lib.default())
    return {
        "mixers": known,
        "defaults": dict(_flat(default)),
        "recipes": {
            name: {key: here for key, (_, here) in config_lib.differing_keys(default, tree(get(name))).items()}
            for name in all_recipes(mixers)
        },
    }


def text(found: dict) -> str:
    """Return the file's text: a line for each default and for each recipe."""
    sections = []
    for section, entries in found.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        sections.append(f"  {json.dumps(section)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    GOLDEN.write_text(text(dump()))
