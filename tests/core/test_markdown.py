"""Text of others in a card, as an independent Markdown renderer shows it."""

from __future__ import annotations

import json

import pytest
from markdown_it import MarkdownIt

from deeparc_hf.core.markdown import code, fenced, json_block, linked, md, plain, table

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "x\n# Heading\n\n- list",
    "![img](http://evil.example/x.png)",
    "[link](javascript:alert(1))",
    "**bold** _it_ ~~no~~ `code`",
    "`` ` ``` tricky",
    "&lt;b&gt; &#60;b&#62;",
    "http://evil.example www.evil.example",
    "\\",
    "trailing \\",
    "---",
    "$x$ $$y$$",
    "{{ 7 * 7 }} {% for x in y %}",
    "a\u202eb\u200bc\x00d\x1b[31m",
    "1. one",
    "- dash",
    "> quote",
    '\'; "quotes" : colon # hash',
    "x" * 5000,
    "",
    "名前 имя",
    "[ref]: http://evil.example",
    "<!-- comment -->",
    "text--with__marks=~",
]
RENDERER = MarkdownIt("commonmark").enable("table")


def shown(markdown):
    """What a reader sees of one paragraph or cell: its text, and the kinds of markup in it."""
    tokens = [child for token in RENDERER.parse(f"before {markdown} after") for child in (token.children or [])]
    return "".join(token.content for token in tokens), {token.type for token in tokens}


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_as_it_is(text):
    seen, kinds = shown(md(text))
    assert seen == f"before {plain(text)} after".replace("before  after", "before  after")
    assert kinds <= {"text", "text_special"}


@pytest.mark.parametrize("text", HOSTILE)
def test_code_shows_the_text_as_it_is_in_a_table_too(text):
    seen, kinds = shown(code(text))
    assert seen == f"before {plain(text)} after" and kinds <= {"text", "text_special", "code_inline"}
    page = RENDERER.parse(table(["a", "b"], [[code(text), md(text)], ["x", "y"]], left=(0, 1)))
    assert [token.type for token in page].count("td_open") == 4
    cells = ["".join(child.content for child in token.children) for token in page if token.type == "inline"]
    assert cells[2:] == [plain(text), plain(text), "x", "y"]


def test_text_is_one_visible_line_of_limited_length():
    assert plain("a\nb\x00c\u202ed\t e") == "a b c d e"
    assert len(plain("x" * 5000)) == 200 and plain("x" * 5000).endswith("...")
    assert plain("x" * 10, 8) == "xxxxx..."


@pytest.mark.parametrize("text", ["plain", "a\n```\nb", "````", "``````\n# x"])
def test_a_block_ends_where_its_text_ends(text):
    (token,) = RENDERER.parse(fenced(text, "text"))
    assert token.type == "fence" and token.content == f"{text}\n"


def test_json_keeps_its_data():
    data = {"a": ["```", "<b>", "é"], "n": 1}
    (token,) = RENDERER.parse(json_block(data))
    assert json.loads(token.content) == data


@pytest.mark.parametrize("name", ["org/name", "bert-base-uncased", "dair-ai/emotion", "org/a_b.c-d"])
def test_names_of_repositories_are_links(name):
    (inline,) = [token for token in RENDERER.parse(linked(name, "datasets/")) if token.type == "inline"]
    link, text, _ = inline.children
    assert link.attrs["href"] == f"https://huggingface.co/datasets/{name}" and text.content == name


@pytest.mark.parametrize(
    "name", ["../../etc", "a/b/c", "org/name)x", "javascript:alert(1)", "a b", "/home/user/model", "org/na--me", ""]
)
def test_what_cannot_be_a_repository_is_no_link(name):
    assert not any(
        token.type == "link_open" for t in RENDERER.parse(f"x {linked(name)}") for token in (t.children or [])
    )
    assert linked(None) == ""


def test_a_bar_is_escaped_once_and_a_line_break_ends_no_row():
    lines = table(["a|b", "c"], [[md("x | y"), "1|2"], ["one\ntwo", "z"]]).split("\n")
    assert lines == ["| a\\|b | c |", "| --- | ---: |", "| x \\| y | 1\\|2 |", "| one two | z |"]
