"""What the programs of this folder share to train: one step, one loop, one checkpointed run over processes.

`steps` and `engines` are for every program; `trainer` adds what `train.py` has: data, epochs, checkpoints and logs, for
each of the `tasks`. `conditions` is what `evaluate.py` measures a trained model under.
"""
