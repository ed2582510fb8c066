"""Check that help and wrong commands are answered at once: without slow libraries, and wrong ones in one line."""

import json

import pytest
from tiny_run import QUICKSTART

from ttt_jax import __version__
from ttt_jax import config as config_lib

PAPER = f"--config {QUICKSTART.replace('quickstart', 'paper')}:ttt_linear-125m-pile-2k"
BENCH = "bench tpu-schedule"
BUILD = f"{BENCH} --function ttt_jax.benchmark.inner_loop:build"
PICTURES = "expected a name that ends in .png, .pdf or .svg"
NO_RUN = "a: holds no run; expected a workdir of ttt train, or of ttt sweep"
HELP_WITHOUT_JAX = ["eval", "plot", "inspect", "probe", "probe needle", "probe task"]
REFUSED_WITHOUT_JAX = {
    "inspect": "error: the following arguments are required: --workdir",
    "inspect --workdir x --context 0": "error: argument --context: '0': expected integers from 1",
    "inspect --workdir x --split dev": "error: argument --split: invalid choice: 'dev'",
    "probe": "error: the following arguments are required: needle|task",
    "probe hay": "error: argument needle|task: invalid choice: 'hay'",
    "probe needle": "error: the following arguments are required: --workdir",
    "probe task": "error: the following arguments are required: --workdir",
    "probe needle --workdir nowhere": "nowhere/config.json: not found; expected the workdir of a run",
    "probe task --workdir nowhere": "nowhere/config.json: not found; expected the workdir of a run",
    "probe needle --workdir x --task passkey,words": "error: argument --task: 'words': expected some of passkey, ",
    "probe needle --workdir x --context 1m": "error: argument --context: '1m': expected integers from 1, such as 2048",
    "probe task --workdir x --items 2,0": "error: argument --items: '0': expected integers from 1, such as 2048 or 2k",
    "probe needle --workdir x --candidates 1": "error: argument --candidates: '1': expected 2 or more",
    "probe needle --workdir x --depths 0": "error: argument --depths: '0': expected 1 or more",
    "probe needle --workdir x stray --config.seed=1": "error: unexpected argument: --config.seed=1",
    "probe task --workdir x --seed 1": "error: unexpected argument: --seed",
    "probe --workdir=x task": "error: unexpected argument: --workdir=x",
    "train --workdir x --config": "--config: missing; expected a config file, such as --config configs/quickstart.py",
}
HELP = ["train", "bench", BENCH, "plan"]
REFUSED = {
    "train --workdir x": "--config: missing; expected a config file, such as --config configs/quickstart.py",
    f"train --workdir x --config {QUICKSTART} --config.model.widht=3": "model.widht: unknown key; did you mean model.",
    f"bench step --config {QUICKSTART} --config.model.num_heads=3": "model.num_heads=3: does not divide",
    BENCH: "--config, --function: missing; expected --config FILE or --function MODULE:NAME",
    f"{BENCH} --config {QUICKSTART} --set heads=3": "--set: expected --function too; keys of a config are set by --con",
    f"{BENCH} --config {QUICKSTART} --compare seed=1 model.heads=2": "model.heads: unknown key; did you mean model.",
    f"{BUILD} --config {QUICKSTART}": "'--config': unexpected argument; --function has no config, its settings are",
    f"{BENCH} --function inner_loop": "--function inner_loop: expected MODULE:NAME or FILE.py:NAME",
    f"{BUILD} --set heads": "--set heads: expected KEY=VALUE",
    f"{BUILD} --compare path=scan": "--compare: expected two or more of KEY=VALUE[,KEY=VALUE...]",
    f"{BUILD} --compare path=scan,unroll path=official": "--compare unroll: expected KEY=VALUE",
    f"{BUILD} --top -1": "error: argument --top: '-1': expected 0 or more",
    "plan --topology v5e:4x4": "--config: missing; expected a config file",
    f"plan {PAPER}": "error: the following arguments are required: --topology",
    f"plan {PAPER} --topology v5e:5x5": "--topology v5e:5x5: expected v5e:AxB or v6e:AxB with AxB one of 1x1, 2x2,",
    f"plan {PAPER} --topology v5e:4x4 --slices 0": "error: argument --slices: '0': expected 1 or more",
    f"plan {PAPER} --topology v5e:4x4 --most 0": "error: argument --most: '0': expected 1 or more",
    f"plan {PAPER} --topology v5e:4x4 --price -1": "--price -1.0: expected USD per chip-hour",
    f"plan {PAPER} --topology v5e:4x4 --config.model.num_heads=7": "model.num_heads=7: does not divide",
}
KINDS = ("loss-by-position", "flops", "context", "mini-batch", "inner-loss", "table")  # of plots
REFUSED_PLOTS = {
    "plot": "error: the following arguments are required: KIND",
    "plot flops": "error: the following arguments are required: DIR",
    "plot flops a --bogus": "error: unexpected argument: --bogus",
    "plot flops a --context 2k,x": "error: argument --context: 'x': expected integers from 1, such as 2048 or 2k,8k",
    "plot flops a --output x.tex": f"--output x.tex: {PICTURES}",
    "plot flops a --output x.svg --output y": f"--output y: {PICTURES}",
    "plot flops a": NO_RUN,
    "plot context s3://b/x": "--workdir s3://b/x: expected a folder, or gs://bucket/name",
    "plot context a --lines colour": "error: argument --lines: invalid choice: 'colour'",
    "plot mini-batch a": NO_RUN,
    "plot inner-loss a b": "error: unexpected argument: b",
    "plot inner-loss a --layers 1-x": "error: argument --layers: 'x': expected 0 or more",
    "plot inner-loss a --layers 0,3-1": "error: argument --layers: '3-1': expected the lower number first",
    "plot loss-by-position a --context 1k,2k": "error: argument --context: '1k,2k': expected one integer from 1",
    "plot inner-loss a --window 0": "error: argument --window: '0': expected 1 or more",
    "plot table a --output x.png": "--output x.png: expected a name that ends in .tex, .csv or .txt",
    "plot table a": NO_RUN,
    "plot loss-by-position a --published": "error: unexpected argument: --published",  # the paper states none
    "plot context a --published": "error: unexpected argument: --published",
    "plot inner-loss a --published": "error: unexpected argument: --published",
}


@pytest.fixture(scope="module")
def printed(in_one_process):
    """Return status, standard output and standard error of every command.

    Only keys of configs need JAX, for those of mixers, and only figures need matplotlib.
    """
    plain = ["--help", "--version", "trian", *(f"{verb} --help" for verb in HELP_WITHOUT_JAX), *REFUSED_WITHOUT_JAX]
    shown = [f"config --config {QUICKSTART}", f"train --help --config {QUICKSTART}"]
    slow = ("orbax", "grain", "tensorstore", "matplotlib", "ttt_jax.data.named_sources")
    return {
        **in_one_process(plain),
        **in_one_process([*(f"{verb} --help" for verb in HELP), *shown, *REFUSED], unwanted=slow),
        **in_one_process([*(f"plot {kind} --help" for kind in KINDS), *REFUSED_PLOTS], unwanted=slow[:2]),
    }


@pytest.mark.parametrize("command", [*REFUSED_WITHOUT_JAX, *REFUSED, *REFUSED_PLOTS])
def test_wrong_arguments_are_refused_in_one_line(printed, command):
    status, out, err = printed[command]
    assert (status, out) == (2, "")
    verb, _, said = err.splitlines()[-1].removeprefix("ttt ").partition(": ")
    assert command.startswith(verb)
    assert said.startswith({**REFUSED_WITHOUT_JAX, **REFUSED, **REFUSED_PLOTS}[command])
    assert "Traceback" not in err
    if "error:" not in err:
        assert err.count("\n") == 1


def test_an_unknown_verb_is_refused_with_a_list_of_verbs(printed):
    status, out, err = printed["trian"]
    assert (status, out) == (2, "")
    assert all(f"'{verb}'" in err.splitlines()[-1] for verb in ("trian", "train", "eval", "plot", "bench"))


def test_the_version_is_printed(printed):
    assert printed["--version"] == [0, f"ttt_jax {__version__}\n", ""]


@pytest.mark.parametrize(
    ("command", "texts"),
    {
        "": ("train ", "eval ", "plot ", "bench ", "ttt train --help", "exit status:", "ttt eval --workdir runs/a"),
        "train": ("--workdir DIR", "--config FILE[:ARG]", "config.json", "metrics.jsonl", "checkpoints/"),
        "eval": ("--workdir", "--context", "--split", "--max-windows", "--step", "--batch-size", "SPLIT-T.npz"),
        "bench": ("bench step", "--repeats", "--warmup", "--json", "matrix products"),
        BENCH: (
            *("--function MODULE:NAME", "--set KEY=VALUE", "--topology", "--compare", "--top", "--json", "--keep"),
            "--config.model.ttt.mini_batch=16",
        ),
        "plan": (
            *("--topology TOPOLOGY", "--slices N", "--price USD", "--search", "--most N", "--json", "v5p:4x4x4"),
            *("--config.mesh.fsdp=1", "Exit status 1 means that the run does not fit."),
        ),
        "inspect": ("DIR/inspect/SPLIT-T.npz", "--context T,...", "--by-document", "--step STEP", "(default: 64)"),
        "probe": ("ttt probe needle", "ttt probe task"),
        "probe needle": (
            *("S-NIAH-1", "--context T,...", "--depths N", "--samples N", "--candidates N", "--haystack FILE"),
            *("needle-TASK.json", "--tokenizer FILE", "--plot FILE", "--step N", "--seed N", "RULER"),
        ),
        "probe task": (
            *("associative_recall", "--items N,...", "--context T,...", "--split", "--plot FILE", "TASK.json"),
        ),
        "plot": (*(f"  {kind} " for kind in KINDS), "ttt plot flops --help"),
        "plot loss-by-position": ("--context", "--by-document", "--against", ".svg", "ttt eval"),
    }.items(),
)
def test_help_names_every_option(printed, command, texts):
    status, out, err = printed[f"{command} --help".strip()]
    assert (status, err) == (0, "")
    assert [text for text in texts if text not in out] == []


@pytest.mark.parametrize("kind", KINDS)
def test_help_of_a_plot_names_its_output(printed, kind):
    status, out, _ = printed[f"plot {kind} --help"]
    assert status == 0
    for text in ("--output FILE", "--split", ".tex" if kind == "table" else f"(default: {kind}.png)"):
        assert text in out
    assert ("--published" in out) == (kind in ("flops", "mini-batch", "table"))


@pytest.mark.parametrize("verb", ["train", "bench"])
def test_help_lists_every_key_with_default_and_meaning(printed, verb):
    for key, each in config_lib.settings().items():
        default = "unset" if each.default is None else json.dumps(each.default)
        lines = printed[f"{verb} --help"][1].splitlines()
        [line] = [line for line in lines if line.startswith(f"  --config.{key}={default}")]
        assert line.endswith(each.meaning)


def test_configs_are_shown_without_slow_libraries(printed):
    for command in (f"config --config {QUICKSTART}", f"train --help --config {QUICKSTART}"):
        status, out, err = printed[command]
        assert (status, err) == (0, "")
        assert "ttt_mlp" in out
