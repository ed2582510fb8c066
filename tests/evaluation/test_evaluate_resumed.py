"""Check that an evaluation resumes after an interruption, with its own partial results only."""

import shutil

import numpy as np
import pytest

from ttt_jax.evaluation.evaluate import Selection, evaluate

pytestmark = pytest.mark.usefixtures("shared_programs")
SELECTION = Selection(22, most=7)


@pytest.fixture
def parts(run):
    """Return the folder of the partial results."""
    return run[0] / "eval" / ".validation-22.unfinished"


@pytest.fixture
def whole(model, data):
    """Return the evaluation that was not stopped."""
    return evaluate(model, SELECTION)


def stop_at(tokens):
    """Return a ``progress`` that stops an evaluation after so many tokens."""

    def progress(done, total):
        if done >= tokens:
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
def test_a_stopped_evaluation_resumes_with_any_batch_size(model, parts, whole):
    for batch_size, tokens in ((2, 44), (4, 110)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, SELECTION, batch_size=batch_size, progress=stop_at(tokens))
    assert {path.suffix for path in parts.iterdir()} == {".npy", ".json"}
    calls = []
    found = evaluate(model, SELECTION, batch_size=2, progress=lambda *done: calls.append(done))
    assert 22 <= calls[0][0] < 154  # starts with some of the losses
    assert not parts.exists()
    np.testing.assert_allclose(found.document_sums, whole.document_sums, rtol=1e-6)
    np.testing.assert_array_equal(found.document_counts, whole.document_counts)


@pytest.mark.parametrize("changed", ["windows", "checkpoint", "learner", "cut short"])
def test_partial_results_of_another_evaluation_are_not_used(model, earlier_model, data, parts, changed):
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SELECTION, batch_size=2, progress=stop_at(66))
    part, selection = min(parts.glob("*.npy")), SELECTION
    if changed == "windows":
        selection = Selection(22, most=6)
    elif changed == "checkpoint":
        model = earlier_model
    elif changed == "learner":
        config = model.config.copy_and_resolve_references()
        config.model.ttt.learner_source = "0" * 64
        model = model._replace(config=config)
    else:
        part.write_bytes(part.read_bytes()[:-4])
    calls = []
    evaluate(model, selection, progress=lambda done, total: calls.append(done))
    assert calls[0] == 0
    if changed == "windows":  # both evaluations keep their partial results
        assert part.exists()
        shutil.rmtree(parts)
    assert not list(parts.parent.glob(".*.unfinished"))


def test_parts_of_earlier_versions_resume(model, data, parts, whole):
    """Resume from parts with NaN at targets that do not count, as earlier versions wrote them."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SELECTION, batch_size=2, progress=stop_at(44))
    windows = [22 * (i * 16 // 7) for i in range(7)]
    place = 0
    for path in sorted(parts.glob("*.npy")):
        part = np.load(path)
        for begin in range(0, len(part), 22):
            targets = data.tokens[windows[place] + 1 : windows[place] + 23]
            part[begin : begin + 22][targets == 256] = np.nan
            place += 1
        np.save(path, part)
    assert place > 0
    found = evaluate(model, SELECTION)
    np.testing.assert_allclose(found.document_sums, whole.document_sums, rtol=1e-6)
    assert (found.about["not_finite"], found.about["tokens"]) == (0, whole.about["tokens"])
