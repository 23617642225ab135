"""The report of a training with weights zeroed in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..reports.provenance import TIMES
from ..sparsity.report import SparsityReport

__all__ = ["SPARSITY_REPORT", "run_markdown"]

SPARSITY_REPORT = "sparsity_report"


def run_markdown(data: Mapping[str, Any]) -> str:
    """The report as Markdown: what was zeroed when, the metrics before and after, and how much was zero at the end of
    each epoch.

    Args:
        data: as in sparsity_report.json.
    """
    parts = ["# Sparsity report of a training\n"]
    if data["report"] is None:
        parts = [
            "# Sparsity report\n\nThe zeros that the checkpoint's record listed when the training began are kept.\n"
        ]
    else:
        parts = [SparsityReport.from_dict(data["report"]).to_markdown()]
        parts.append(f"Zeroed in the training, at step {data['step']} (epoch {data['epoch']:g}).\n")
    if not data["config"]["keep_zeros"]:
        parts.append(
            "The zeros were not kept while training went on (keep_zeros=False): the model at the end is dense.\n"
        )
    if data["evaluations"]:
        parts.append(f"## Evaluations\n\n{_evaluations(data['evaluations'])}\n")
    if data["measured"]:
        rows = [f"| {m['epoch']:g} | {m['step']} | {100 * m['share']:.4f} |" for m in data["measured"]]
        head = "| epoch | step | zeros in the recorded matrices (%) |\n| ---: | ---: | ---: |"
        parts.append("## Measured at the end of each epoch\n\n" + "\n".join([head, *rows]) + "\n")
    facts = {**data["hardware"], **data["versions"]}
    parts.append("## Made with\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")
    return "\n".join(parts)


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    names = [key for key in dict.fromkeys(key for e in evaluations for key in e["metrics"]) if not key.endswith(TIMES)]
    lines = [
        f"| epoch | step | blocks | weights | {' | '.join(names)} |",
        f"| ---: | ---: | ---: | --- |{' ---: |' * len(names)}",
    ]
    for entry in evaluations:
        values = [entry["metrics"].get(name) for name in names]
        zeroed = "zeroed" if entry["sparse"] else "not zeroed"
        shown = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {entry['epoch']:g} | {entry['step']} | {entry['blocks']} | {zeroed} | {' | '.join(shown)} |")
    return "\n".join(lines)
