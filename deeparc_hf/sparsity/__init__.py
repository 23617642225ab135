"""Weight sparsity: methods, masks, the linear maps of blocks, and zeroing them on a live model.

May import `observe`, `checkpoint` and what is below them, and its neighbours `pruning`, `distillation`, `healing`.
"""
