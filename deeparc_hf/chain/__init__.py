"""A chain of trainings: one training with prunings in it, cut wherever the model's structure changes, so that its
parameters may be sharded (FSDP2, DeepSpeed) in between.
"""
