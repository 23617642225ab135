"""Healing: the kept block before each removal site is refitted in closed form.

May import `observe`, `checkpoint` and what is below them, and its neighbours `pruning`, `sparsity`, `distillation`.
"""
