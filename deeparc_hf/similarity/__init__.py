"""Similarity metrics: one file a metric. See CONTRIBUTING.md, "add a metric"."""

from __future__ import annotations

from .base import ROW_KINDS, SimilarityMetric, metrics, register

__all__ = ["ROW_KINDS", "SimilarityMetric", "metrics", "register"]
