"""Results of other data or windows are kept beside one another, and the one that is asked for is found."""

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import catalogue, evaluations, statistics
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.storage import json_files


def save(workdir, stem="texts-test-6", loss=1.0, **about):
    found = statistics.summarise([Segment(0, 0, np.full(6, loss), np.ones(6, bool))], 6)
    known = {"split": "test", "context": 6, "of": "windows", "windows": 4, "loss": loss, **about}
    return evaluations.save(evaluations.from_summary(known, found), workdir / "eval", stem)


def of(workdir, **kind):
    return evaluations.read(workdir, "test", 6, **kind).about["loss"]


def test_two_datasets_of_one_last_name_are_both_kept_and_found_by_path(tmp_path):
    for loss, place in enumerate("xyx", 1):
        save(tmp_path, loss=float(loss), source_path=f"/{place}/texts", fingerprint=place)
    assert len(list((tmp_path / "eval").glob("*.json"))) == 2  # the third is in place of the first
    assert (of(tmp_path, source="/x/texts"), of(tmp_path, source="/y/texts")) == (3.0, 2.0)
    with pytest.raises(ConfigError, match="no evaluation of the test split"):
        of(tmp_path, source="/z/others")


def test_two_numbers_of_windows_are_both_kept_and_one_has_to_be_chosen(tmp_path):
    for windows in (4, 2):
        path = save(tmp_path, "test-6", loss=float(windows), windows=windows, fingerprint="f")
    assert path.name != "test-6.npz"
    assert (of(tmp_path, windows=4), of(tmp_path, windows=2)) == (4.0, 2.0)
    with pytest.raises(ConfigError) as caught:
        of(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'eval'}: 2 results of the test split with context 6: test-6 (4 windows of ")


def test_files_of_before_are_found(tmp_path):
    save(tmp_path, loss=5.0)
    assert of(tmp_path, source="/gone/texts") == 5.0


def test_what_takes_the_place_of_the_result_of_an_earlier_step_says_so(tmp_path, capsys):
    about = {"fingerprint": "f", "context": 8, "windows": 2, "step": 4}
    json_files.write_object(tmp_path / "test-8.json", about)
    assert catalogue.place(tmp_path, "test-8", about) == "test-8"
    assert capsys.readouterr().err == ""
    assert catalogue.place(tmp_path, "test-8", {**about, "step": 6}) == "test-8"
    said = f"{tmp_path / 'test-8'}.json: in place of the result of step 4; --step keeps one of each\n"
    assert capsys.readouterr().err == said


def test_what_there_is_is_listed_for_who_asks_for_something_else(tmp_path):
    assert catalogue.there_are(tmp_path / "eval") == ""
    for count in (1, 2, 10):
        for i in range(count):
            folder = tmp_path / str(count)
            folder.mkdir(exist_ok=True)
            (folder / f"test-{i}.json").write_text("{}")
    assert catalogue.there_are(tmp_path / "1") == "; there is test-0"
    assert catalogue.there_are(tmp_path / "2") == "; there are test-0, test-1"
    eight = ", ".join(f"test-{i}" for i in range(8))
    assert catalogue.there_are(tmp_path / "10") == f"; there are {eight} and 2 more"
