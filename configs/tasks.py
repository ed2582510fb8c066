"""draft"""

from ttt_jax import config as config_lib


def get_config(arg: str = "associative_recall"):
    task, _, mixer = arg.partition(",")
    c = config_lib.default()
    c.model.mixer = mixer or "ttt_linear"
    c.model.vocab_size = 64
    c.model.width = 64
    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.mlp_width = 128
    c.data.source = task
    c.data.sequence_length = 64
    c.data.batch_size = 32
    c.optimizer.peak_lr = 3e-3
    c.training.duration = "600 steps"
    c.log.every = "20 steps"
    return c
