"""Similarity metrics: one file a metric. See CONTRIBUTING.md, "add a metric"."""

from __future__ import annotations

from .base import ROW_KINDS, BlockMetric, SimilarityMetric, SkippingMetric, metrics, register

__all__ = ["ROW_KINDS", "BlockMetric", "SimilarityMetric", "SkippingMetric", "metrics", "register"]
