"""Shrink the recipes of paper.py and ablation.py, so that two CPU cores train one in less than a minute.

    ttt train --config configs/tiny.py:ttt_linear-125m-pile-2k --workdir runs/tiny        # or any other of paper.py
    ttt train --config configs/tiny.py:learned_w0 --workdir runs/learned_w0                # or any other of ablation.py

ARG is that of paper.py, or of ablation.py. The differences between recipes are kept: mixer, backbone, four sizes,
contexts (a 16th: 2k is 128 tokens), steps that grow with the size, fine-tuning. A batch has 2048 bytes of the embedded
corpus. scripts/reproduce/ runs these recipes at --scale tiny (docs/reproduce.md), to check that an experiment works
from end to end; results at this size say nothing about those of the paper.

Hardware: two CPU cores, 0.3 GiB beside the libraries; 120 to 250 thousand tokens, 10 to 60 s. Loss 2.1 to 2.9 nats per
byte.
"""

from . import ablation, paper

SIZES = {  # as in paper.py: blocks, width, heads, feed-forward width, steps, peak learning rate
    "125m": (2, 32, 2, 80, 60, 1e-2),
    "350m": (2, 48, 3, 128, 80, 1e-2),
    "760m": (3, 64, 4, 176, 100, 1e-2),
    "1.3b": (4, 80, 5, 208, 120, 7e-3),
}
BATCH = 2048  # tokens
SHORTER = 16  # the factor by which contexts are shorter
FINETUNING_LR = 0.1  # as a part of the peak learning rate


def get_config(arg: str = "ttt_linear-125m-pile-2k"):
    of_ablation = "-" not in arg
    c = (ablation if of_ablation else paper).get_config(arg)
    size = "125m" if of_ablation else arg.split("-")[-3]
    finetunes = bool(c.training.start_from)
    c.data.update(source="embedded", sequence_length=c.data.sequence_length // SHORTER)
    c.data.batch_size = BATCH // c.data.sequence_length
    c.model.num_layers, c.model.width, c.model.num_heads, c.model.mlp_width, steps, peak_lr = SIZES[size]
    c.model.update(vocab_size=258, dtype="float32", remat="none")
    if c.model.ttt.mini_batch > 16:  # the whole sequence, one step of batch gradient descent
        c.model.ttt.mini_batch = c.data.sequence_length
    c.mesh.update(data=-1, fsdp=1, tensor=1)
    c.optimizer.peak_lr = peak_lr * FINETUNING_LR if finetunes else peak_lr
    c.training.duration = f"{steps // 5 if finetunes else steps} steps"
    c.checkpoint.every = "100%"
    return c
