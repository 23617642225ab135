"""Removing blocks: settings, clusters, plans (pure), surgery on a live model, verification, freezing.

May import `observe`, `checkpoint` and what is below them, and its neighbours `sparsity`, `distillation`, `healing`.
"""
