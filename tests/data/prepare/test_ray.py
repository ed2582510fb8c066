"""Tokenize on a Ray cluster of two nodes on this machine."""

import logging
import subprocess
import sys
from pathlib import Path

import corpus
import pytest

from ttt_jax import cli
from ttt_jax.data.prepare import tokenize_units, tokenizer
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store

pytestmark = pytest.mark.slow

TEXTS = corpus.documents(80)


@pytest.fixture(scope="module")
def cluster():
    """Start a cluster of two nodes with one CPU each, and return its address."""
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    running.add_node(num_cpus=1)
    yield running.address
    running.shutdown()


@pytest.fixture
def file(tmp_path):
    return corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(TEXTS) + b"junk\n" + corpus.jsonl(TEXTS[:9]))


def test_a_cluster_tokenizes(tmp_path, cluster, file, capsys):
    """Check everything that needs a cluster, in one test, so that it starts once if tests run in several processes."""
    check_the_dataset_equals_that_of_this_process(tmp_path, cluster, file)
    check_a_command_continues_without_the_cluster(tmp_path, cluster, file, capsys)
    check_a_tokenizer_that_cannot_be_loaded_is_one_clear_line(cluster)


def check_the_dataset_equals_that_of_this_process(tmp_path, cluster, file):
    import ray

    job = Job(tokenizer.byte(), 256, 257, validation_fraction=0.3)
    options = {"shard": 512, "chunk": 64, "unit_bytes": 500, "skip_problems": True}
    tokenize([file], job, Store(tmp_path / "ray"), tokenize_units.ray(cluster), **options)
    tokenize([file], job, Store(tmp_path / "here"), corpus.in_this_process, **options)
    assert corpus.contents(tmp_path / "ray") == corpus.contents(tmp_path / "here")
    assert not ray.is_initialized()


def check_a_command_continues_without_the_cluster(tmp_path, cluster, file, capsys):
    """Stop at a bad record on the cluster, and continue in this process."""
    command = ["tokenize", "--train", file.location, "--tokenizer", "byte", "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--engine", "ray", "--ray-address", cluster]) == 1
    assert capsys.readouterr().err.startswith(f"ttt tokenize: {file.location}, record 81: not JSON: ")
    assert cli.main([*command, "--workers", "1", "--on-error", "skip"]) == 0
    expected = [token for text in TEXTS + TEXTS[:9] for token in (256, *text.encode(), 257)]
    assert corpus.stored(tmp_path / "out/train").tolist() == expected


def check_a_tokenizer_that_cannot_be_loaded_is_one_clear_line(cluster):
    broken = tokenizer.Tokenizer("huggingface", "tokenizer.json", b"{}", 300, None, None)
    unit = tokenize_units.Unit("values", ["a"], 1, None, None)
    with pytest.raises(DataError) as caught:
        list(tokenize_units.ray(cluster)(Job(broken, None, None), [("train", unit)]))
    message = str(caught.value)
    assert message.startswith("--engine ray: ")
    assert "tokenizer.json: not a Hugging Face tokenizer" in message
    assert "\n" not in message


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_an_address_without_a_cluster_is_refused_within_seconds(file, tmp_path, address):
    """Run in another process, as Ray may end the process that it runs in."""
    command = [sys.executable, "-m", "ttt_jax", "tokenize", "--train", file.location, "--tokenizer", "byte"]
    command += ["--output", str(tmp_path / "out"), "--engine", "ray", "--ray-address", address]
    root = Path(corpus.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ttt tokenize: --ray-address {address}: no such cluster (")
    assert done.stderr.count("\n") == 1
