"""Print pip constraints that hold the package's dependencies at the lowest versions that setup.py admits; tools stay at
their newest.

python tests/lowest.py > lowest.txt && PIP_CONSTRAINT=lowest.txt make test
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.py"
# lists in setup.py of what only developers need, or a recipe or a page of the documents alone
TOOLS = {"CHAT", "DOCS", "EXPORTS", "HARNESS", "INTEGRATIONS", "LINT", "RELEASE", "SENTENCES", "TEST"}
_LOWER_BOUND = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)>=([0-9][0-9.]*)")


def lowest(source: str) -> list[str]:
    """Constraints "name==version", sorted, for every "name>=version" among the strings of a setup.py, but for the
    tools.
    """
    statements = [node for node in ast.parse(source).body if not _assigns_tools(node)]
    nodes = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Constant)]
    matches = [_LOWER_BOUND.fullmatch(node.value) for node in nodes if isinstance(node.value, str)]
    return sorted({f"{match[1]}=={match[2]}" for match in matches if match})


def _assigns_tools(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in TOOLS for target in statement.targets
    )


if __name__ == "__main__":
    print("\n".join(lowest(SETUP.read_text("utf-8"))))
