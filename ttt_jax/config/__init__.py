"""Make the config of a run, one locked tree of all sections, from the command line, files or JSON.

A config file is Python with ``get_config(arg="")`` that starts from :func:`default` and changes what it needs. Every
key can be set from the command line too: ``--config.optimizer.peak_lr=1e-3``.
"""

from ttt_jax.config.arguments import about_config as about_config
from ttt_jax.config.arguments import count_files as count_files
from ttt_jax.config.arguments import from_arguments as from_arguments
from ttt_jax.config.arguments import replace_files as replace_files
from ttt_jax.config.arguments import split_arguments as split_arguments
from ttt_jax.config.files import from_dict as from_dict
from ttt_jax.config.files import from_json as from_json
from ttt_jax.config.sections import GENERATED as GENERATED
from ttt_jax.config.sections import profiled_steps as profiled_steps
from ttt_jax.config.tree import changes_results as changes_results
from ttt_jax.config.tree import default as default
from ttt_jax.config.tree import may_change as may_change
from ttt_jax.config.tree import mesh_shape as mesh_shape
from ttt_jax.config.tree import own_functions as own_functions
from ttt_jax.config.tree import settings as settings
from ttt_jax.config.tree import steps as steps
from ttt_jax.config.tree import validate as validate
from ttt_jax.errors import ConfigError as ConfigError
from ttt_jax.settings import differing_keys as differing_keys
from ttt_jax.settings import set_value as set_value
from ttt_jax.settings import value_of as value_of
