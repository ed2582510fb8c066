"""Whether a run may go on where its ``config.json`` is damaged."""

import re

import pytest

from ttt_jax import config as config_lib
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.training import resume, run_config


@pytest.mark.parametrize(
    ("content", "said"), [("", "damaged: it is empty"), ("[]", "damaged: it holds no JSON object")]
)
def test_a_damaged_config_of_a_run_without_checkpoints_is_written_anew(tmp_path, capsys, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    resume.check_same_run(config_lib.default(), tmp_path)
    assert capsys.readouterr().err == f"{path}: {said}; no checkpoint has been saved, so the run begins anew\n"
    run_config.write(tmp_path, config_lib.default())
    assert (tmp_path / "config.json.damaged").read_text() == content
    assert run_config.load(tmp_path).to_dict() == config_lib.default().to_dict()


def test_one_of_a_run_whose_checkpoints_do_not_hold_it_ends_the_command(tmp_path):
    (tmp_path / "config.json").write_text("")
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert run_config.saved_steps(tmp_path) == [10]
    with pytest.raises(DamagedFile, match=f"^{re.escape(str(tmp_path))}/config.json: damaged: it is empty$"):
        resume.check_same_run(config_lib.default(), tmp_path)
