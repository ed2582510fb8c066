"""Plan the paper's recipes by one script, and print its tables."""

import json
import math
import sys
from pathlib import Path

import pytest

from ttt_jax import config as config_lib

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan_recipes.py"
CHIPS = {"v5e:16x16": 256, "v5e:8x16": 128, "v5e:8x8": 64}


@pytest.fixture
def script(load_script):
    return load_script("plan_recipes")


def test_every_recipe_divides_its_chips(script):
    names = [*script.RECIPES, *script.VARIANTS]
    assert len(set(names)) == len(names) == 3 * 4 * 3 + 20
    for name in names:
        command = script.command(name)
        where = command.index("--topology")
        config = config_lib.from_arguments(command[command.index("--config") : where])
        model = config.mesh.fsdp * config.mesh.tensor
        data = CHIPS[command[where + 1]] // model
        assert data * model == CHIPS[command[where + 1]], name
        rows = config.data.batch_size // config.training.accumulation
        assert rows % (data * config.mesh.fsdp) == 0, name
        assert config.model.num_heads % config.mesh.tensor == 0, name


@pytest.mark.slow
@pytest.mark.usefixtures("for_libtpu")
def test_plans_are_stored_and_printed(script, tmp_path, monkeypatch, capsys):
    smoke, file = "ttt_linear-125m-pile-2k:smoke", tmp_path / "plans.jsonl"
    monkeypatch.setattr(script, "RECIPES", [])
    monkeypatch.setattr(script, "VARIANTS", [smoke, f"{smoke} mesh.tensor=3"])
    monkeypatch.setattr(script, "TOPOLOGIES", {"smoke": "v5e:2x2"})
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(file)])
    assert script.main() == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"{smoke} mesh.tensor=3: status 2: ttt plan: mesh.data=-1, mesh.fsdp=1, mesh.tensor=3: ")
    (p,) = map(json.loads, file.read_text().splitlines())
    assert p["name"] == smoke
    assert p["chips"] == math.prod(p["mesh"].values()) == 4
    (row,) = [line for line in out.splitlines() if line.startswith(f"| {smoke} ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == [f"{smoke} (4 chips)", "4 x 1 x 1"]
    assert [float(cell.split(" ")[0]) for cell in cells[3:6]] == pytest.approx(
        [
            (p["memory"]["parameters"] + p["memory"]["moments"]) / 2**30,
            (p["memory"]["total"] - p["memory"]["parameters"] - p["memory"]["moments"]) / 2**30,
            p["memory"]["total"] / 2**30,
        ],
        abs=0.005,
    )
    assert cells[5].endswith("yes")
    assert cells[8] == f"{p['step_time']['total']:.3f} s"
    assert cells[7] == str(sum(kind["count"] for kind in p["collectives"].values()))

    monkeypatch.setattr(script, "VARIANTS", [smoke])  # there: nothing is planned, nothing fails
    monkeypatch.setattr(script, "plan", lambda *_: pytest.fail("planned again"))
    assert script.main() == 0
    assert row in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "shown"), [(0.05, "3 min"), (0.9, "54 min"), (1.0, "1.0 h"), (14.96, "15.0 h"), (None, "")]
)
def test_a_cell_of_the_table(script, hours, shown):
    time = None if hours is None else {"total": 0.03467}
    p = {"memory": {"total": 5.76 * 2**30}, "step_time": time, "hours": hours}
    assert script.brief(p) == (f"5.8 GiB, 0.035 s, {shown}" if shown else "5.8 GiB: too much")
