"""Run ``ttt probe``: tables, heat maps, and that a second command computes nothing."""

import csv
import json
import re
import types

import pytest
from matplotlib import image
from tiny_run import ttt

from ttt_jax import config as config_lib
from ttt_jax.cli import probe
from ttt_jax.storage import json_files


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_run):
    """Return the workdir of a tiny run on a task, at step 2."""
    config = config_lib.default()
    config.model.update(mixer="attention", width=8, num_layers=1, num_heads=2, mlp_width=8)
    config.data.update(source="associative_recall:2", sequence_length=16, batch_size=4)
    workdir = tmp_path_factory.mktemp("cli") / "tiny"
    save_run(workdir, config, (2,), stddev=0.02)
    return workdir


@pytest.mark.slow
def test_a_task(run, tmp_path, capsys):
    picture = tmp_path / "map.png"
    command = ("probe", "task", "--workdir", run, "--items", "2,1", "--context", "32,16", "--samples", "5")
    assert ttt(*command, "--plot", picture) == 0
    out = capsys.readouterr().out
    assert "tiny: Transformer, step 2; associative_recall, trained on 2 pairs in 16 tokens" in out
    rows = [re.findall(r"\d\.\d\d \(\d\.\d\d\)", line) for line in out.splitlines()]
    assert [len(row) for row in rows if row] == [2, 2, 2]  # 1 and 2 pairs, and the mean
    assert str(picture) in out
    assert image.imread(picture).shape[1] > 100
    with (run / "probe" / "associative_recall.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [(cell["items"], cell["context"]) for cell in cells] == [("1", "16"), ("1", "32"), ("2", "16"), ("2", "32")]
    before = (run / "probe" / "associative_recall.json").read_bytes()
    assert ttt(*command) == 0
    assert (run / "probe" / "associative_recall.json").read_bytes() == before
    again = capsys.readouterr().out
    assert again in out


@pytest.mark.slow
def test_needles(run, tmp_path, capsys):
    """Probe a model that was not trained on text; a vocabulary of bytes is sufficient."""
    book, picture = tmp_path / "book.txt", tmp_path / "map.svg"
    book.write_text("It was a dark night. Nobody knew why! " * 40)
    command = ("probe", "needle", "--workdir", run, "--tokenizer", "byte", "--haystack", book, "--samples", "2")
    command = (*command, "--context", "500", "--depths", "2", "--task", "number,passkey", "--candidates", "3")
    assert ttt(*command, "--plot", picture, "--show", "ranked_first") == 0
    out, err = capsys.readouterr()
    assert re.search(r"tiny: 4,000 tokens of prompts to read, about \d+:\d\d left", err)
    assert "tiny: Transformer, step 2; number (S-NIAH-2)" in out
    assert "tiny: Transformer, step 2; passkey (S-NIAH-1)" in out
    assert "share right (share likelier than 2 other answers); 2 samples, book.txt" in out
    assert [line.split()[0] for line in out.splitlines() if "(" in line and "%" in line] == ["0", "100"] * 2
    assert "share ranked first of 3" in picture.read_text()
    found = json.loads((run / "probe" / "needle-number.json").read_text())
    assert [(cell["context"], cell["depth"]) for cell in found["cells"]] == [(500, 0.0), (500, 100.0)]
    assert found["haystacks"] == "book.txt"
    assert {cell["bos"] for cell in found["cells"]} == {None}  # the data has none, whatever the tokenizer has
    assert ttt(*command) == 0
    assert "to read" not in capsys.readouterr().err


def test_a_run_without_tokenizer_is_refused(run, capsys):
    assert ttt("probe", "needle", "--workdir", run) == 2
    said = "data.source='associative_recall:2': no tokenizer is kept with it; expected --tokenizer FILE, or byte\n"
    assert capsys.readouterr().err == f"ttt probe needle: {said}"


def test_a_run_whose_data_is_gone_is_refused(run, tmp_path, capsys):
    config = json_files.read_object(run / "config.json")
    config["data"]["source"] = "data/books"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for more in ((), ("--tokenizer", "byte")):  # whose haystacks are the documents of the run
        assert ttt("probe", "needle", "--workdir", tmp_path, *more) == 2
        assert capsys.readouterr().err.startswith(
            "ttt probe needle: data.source='data/books': no such folder; expected "
        )


def test_a_run_without_text_needs_a_haystack(run, capsys):
    assert ttt("probe", "needle", "--workdir", run, "--tokenizer", "byte", "--task", "number") == 2
    said = "data.source='associative_recall:2': holds no text that could be read; expected --haystack FILE\n"
    assert capsys.readouterr().err == f"ttt probe needle: {said}"


def test_an_unknown_kind_of_file_is_refused_first(run, tmp_path, capsys):
    for kind in ("needle", "task"):
        assert ttt("probe", kind, "--workdir", run, "--plot", tmp_path / "map.txt") == 2
        assert "map.txt: expected a name that ends in .png, .pdf or .svg" in capsys.readouterr().err


def test_a_run_on_text_has_no_task(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_lib.default().to_dict()))
    assert ttt("probe", "task", "--workdir", tmp_path) == 2
    assert "data.source='embedded': is not a task to probe" in capsys.readouterr().err


def test_the_time_left_is_proportional_to_the_tokens_left(monkeypatch, capsys):
    now, shown = [0.0], []
    monkeypatch.setattr(probe, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    line = types.SimpleNamespace(show=lambda done, text: shown.append((done, text)))
    monkeypatch.setattr(probe, "StatusLine", lambda total, text: line)
    found = probe._Progress("a run", 4000)
    found.show("number, context 500")
    now[0] = 30.0
    found.add(1000)
    assert capsys.readouterr().err == "a run: 4,000 tokens of prompts to read, about 1:30 left\n"
    found.add(3000)
    assert capsys.readouterr().err == ""
    assert shown == [
        (0, "a run: number, context 500"),
        (1000, "a run: number, context 500, about 1:30 left"),
        (4000, "a run: number, context 500"),
    ]
