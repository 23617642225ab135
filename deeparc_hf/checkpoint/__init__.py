"""Checkpoints of pruned models: the record in config.json, loading and saving, and the mark of the weights.

May import `architectures`, `similarity` and `core`.
"""
