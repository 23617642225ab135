"""Reads the tables that recipes write."""

from __future__ import annotations

import re


def tables(text):
    """The tables by heading (the first has none): each a list of {column: cell}."""
    found, heading = {"": []}, ""
    header = None
    for line in text.splitlines():
        if line.startswith("## "):
            heading, header = line[3:], None
            found[heading] = []
        elif line.startswith("|"):
            cells = re.split(r" *\| *", line.strip("| "))
            if header is None:
                header = cells
            elif set(line) - set("|-: "):
                found[heading].append(dict(zip(header, cells, strict=True)))
    return found


def line(rows, cell, model):
    """The figures of one model."""
    [found] = [row for row in rows if (row["cell"], row["model"]) == (cell, model)]
    return {key: value for key, value in found.items() if key not in ("cell", "model")}
