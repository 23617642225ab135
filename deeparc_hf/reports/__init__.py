"""Reports of plans and of trainings: written beside a checkpoint, and read again by the model card.

May import `pruning`, `sparsity`, `distillation`, `healing` and what is below them, and its neighbour `publish`.
"""
