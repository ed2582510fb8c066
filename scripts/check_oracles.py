#!/usr/bin/env python3
"""Compare this package with numbers computed by the TTT and LaCT authors' own code, and by transformers.

    python scripts/check_oracles.py tests/oracles tests/oracles/lact tests/oracles/baselines

Reads every .npz of the oracle format in the given folders, prints one line per file with the largest error of each
kind, and exits 1 if an error exceeds its tolerance or if there was nothing to compare.
"""

import argparse
import sys
import zipfile
import zlib
from pathlib import Path

import jax

from ttt_jax.interop import lact_oracles, llama, oracles


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path, help="folder with .npz files")
    folders = parser.parse_args(argv).folder
    jax.config.update("jax_platforms", "cpu")  # the tolerances are those of float32 on a CPU
    failed = compared = 0
    for folder in folders:
        if not folder.is_dir():
            print(f"check_oracles: {folder}: not a folder", file=sys.stderr)
            return 2
        for path in sorted(folder.glob("*.npz")):
            try:
                report = oracles.check(path) or lact_oracles.check(path) or llama.check(path)
            except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                print(f"FAIL  {path.name}: {error}", flush=True)
                failed += 1
                continue
            if report is None:
                print(f"--    {path.name}: another format, not compared", flush=True)
                continue
            compared += 1
            failed += not report.passed
            print(f"{'ok  ' if report.passed else 'FAIL'}  {path.name}: {report}", flush=True)
    print(f"{compared} compared, {failed} failed")
    return 1 if failed or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
