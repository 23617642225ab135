"""Puts what lies beside docs/ into the site: the recipes, the cards of kept runs, the benchmarks' tables, CONTRIBUTING.

Links in the pages are those of the repository, so that they work there too. In the site the pages of docs/ lie where
the repository's root is, and their links are changed to match.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/*.md",
    "examples/*.py",
    "examples/*.yaml",
    "model_cards/**/*.md",
    "model_cards/**/*.png",
    "recipes/README.md",
)
_TO_ROOT = re.compile(r"(?<=\]\()\.\./")
_TO_DOCS = re.compile(r"(?<=\]\()((?:\.\./)*)docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files beside docs/ under the paths that they have in the repository."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes links between docs/ and what lies beside it."""
    if page.file.generated_by is None and PurePosixPath(page.file.src_uri).parent == PurePosixPath("."):
        return _TO_ROOT.sub("", markdown)
    return _TO_DOCS.sub(r"\1", markdown)
