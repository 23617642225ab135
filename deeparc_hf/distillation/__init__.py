"""Distillation: the unpruned model teaches the pruned one.

May import `observe`, `checkpoint` and what is below them, and its neighbours `pruning`, `sparsity`, `healing`.
"""
