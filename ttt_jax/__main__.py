"""``python -m ttt_jax`` is ``ttt``."""

import sys

from ttt_jax.cli import main

sys.exit(main())
