"""The estimate of a probe, from the prompts that have been read."""

import types

from ttt_jax.evaluation.probes import progress


def test_the_time_left_is_in_proportion_to_the_tokens(monkeypatch, capsys):
    now, shown = [0.0], []
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    line = types.SimpleNamespace(show=lambda done, text: shown.append((done, text)))
    monkeypatch.setattr(progress, "StatusLine", lambda total, text: line)
    found = progress.Progress("a run", 4000)
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
