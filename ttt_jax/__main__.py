"""Run ``ttt`` as ``python -m ttt_jax``."""

import sys

from ttt_jax.cli import main

sys.exit(main())
