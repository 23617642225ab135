"""What a notebook shows: tables of plans, stacks, records and reports as HTML in which nothing is markup, and the
heatmap of a plan.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from deeparc_hf import MPruneConfig, PrunedConfig, PruningPlan, find_stacks, remove_blocks, sparsify_model
from deeparc_hf.checkpoint.record import StackRecord
from deeparc_hf.core.tables import html_table, spans
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.healing.sites import Healing, Site
from deeparc_hf.pruning.plan import ComparedStack, make_plan

from .zoo import ZOO

TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "div"}
EVIL = "<script>alert('x')</script>\x1b[31m\u202e&amp;\n\"onmouseover=1 x="


class Page(HTMLParser):
    """The tags, the attributes, the rows of cells and the other text of a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.other = [], set(), set(), [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.other += data


def page_of(shown):
    """The page that a notebook makes of an object; nothing but tables is in it, and nothing unseen."""
    text = shown._repr_html_()
    page = Page(text)
    assert page.tags <= TAGS and page.attributes <= {"style"}
    assert all(sign.isprintable() for sign in text.replace("\n", ""))
    return page


def a_plan(names=("enc.block", "dec.block"), length=5, **settings):
    matrix = tuple(tuple(1.0 - abs(i - j) / 10 for j in range(length)) for i in range(length))
    compared = {name: ComparedStack(matrix, {0: f"owns {name}"}) for name in names}
    return make_plan(compared, MPruneConfig(**{"num_blocks": len(names) * length - 2, **settings}), samples=64)


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    matplotlib.use("agg")
    yield
    pyplot.close("all")


def test_a_plan_shows_what_its_text_shows():
    plan = a_plan(freeze="partial")
    page = page_of(plan)
    lines = str(plan).splitlines()
    assert page.rows[0] == lines[0].split()
    assert [row[0] for row in page.rows[1:]] == list(plan.stacks)
    for row, stack in zip(page.rows[1:], plan.stacks.values(), strict=True):
        assert row[1:3] == [str(len(stack)), str(len(stack.kept))]
        assert row[5] == (",".join(map(str, stack.removed)) or "-")
    assert lines[-1] in page.other and "enc.block.0 is pinned: owns enc.block" in page.other


def test_a_stack_shows_its_blocks():
    model = ZOO["t5"].model()
    stack = find_stacks(model)["encoder.block"]
    page = page_of(stack)
    assert f"encoder.block: {len(stack)} blocks" in page.other
    assert page.rows[1][0] == "0" and page.rows[1][3] == stack.pinned[0]
    assert page.rows[2] == [
        f"1-{len(stack) - 1}",
        "T5Block",
        f"{sum(p.numel() for p in stack.blocks[1].parameters()):,}",
        "",
    ]


def test_a_record_shows_each_pruning_by_original_numbers():
    model = ZOO["bert"].model()
    remove_blocks(model, {"bert.encoder.layer": [1]})
    remove_blocks(model, {"bert.encoder.layer": [1]})
    page = page_of(PrunedConfig.from_model(model))
    assert page.rows[1] == ["bert.encoder.layer", "4", "2", "0, 3", "1, 2"]
    assert [row[1] for row in page.rows[3:]] == ["bert.encoder.layer: 1", "bert.encoder.layer: 2"]
    assert "Pruned 2 times" in page.other
    assert "No block was removed" in page_of(PrunedConfig({})).other


def test_a_sparsity_report_shows_its_table():
    model = ZOO["bert"].model()
    report = sparsify_model(model, method="magnitude", sparsity=0.5)
    page = page_of(report)
    lines = [
        line.strip("| ").split(" | ")
        for line in str(report).splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert page.rows == lines
    zeroed = page_of(PrunedConfig.from_model(model))
    assert "Zeroed weights: 50.00 %" in zeroed.other


def test_a_healed_site_shows_its_outcome():
    site = Site("enc", 1, (2, 3, 4))
    assert page_of(Healing(site, held_out=0.25, strength=0.01)).rows[1] == ["enc", "2-4", "1", "healed", "25.0", "0.01"]
    assert page_of(Healing(site, reason="no map")).rows[1] == ["enc", "2-4", "1", "no map", "-", "-"]


@pytest.mark.parametrize(
    "shown",
    [
        a_plan((EVIL, "b")),
        PrunedConfig(
            {EVIL: StackRecord(3, (0, 2))},
            base_model=EVIL,
            iterations=(
                {"settings": {"num_blocks": EVIL}, "removed": {EVIL: [1]}, "samples": EVIL},
                {"settings": EVIL, "removed": EVIL, "frozen": {EVIL: [10**5000, -1, EVIL]}, "samples": 10**5000},
                {"settings": {"threshold": 10**5000}, "removed": {"s": EVIL}},
            ),
        ),
        Healing(Site(EVIL, 0, (1,)), reason=EVIL),
    ],
    ids=["plan", "record", "healing"],
)
def test_text_of_others_is_text(shown):
    page = page_of(shown)
    everything = page.other + "".join(cell for row in page.rows for cell in row)
    assert "<script>alert('x')</script>" in everything


def test_cells_and_rows_have_their_bounds():
    text = html_table("c", ["a"], [["x" * 10_000]] * 2000, ["end"])
    assert len(text) < 400_000 and "and 1500 more" in text and "end" in text
    assert spans([0, 1, 2, 3, 5, 6, 9]) == "0-3, 5, 6, 9" and spans([]) == "-"


def test_plot_gives_the_axes_of_every_stack():
    plan = a_plan()
    axes = plan.plot()
    assert [axis.get_title().partition("\n")[0] for axis in axes] == list(plan.stacks)
    assert all(axis.images[0].get_array().shape == (5, 5) for axis in axes)
    one = plan.plot(stack="dec.block")
    assert one.get_title().startswith("dec.block\n")
    alone = a_plan(["s"], num_blocks=4)
    assert alone.plot().get_title().startswith("s\n4 of 5 blocks stay")


def test_plot_draws_into_axes_of_the_user():
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2)
    assert a_plan().plot(stack="enc.block", ax=right) is right
    assert not left.images and right.images[0].get_array().shape == (5, 5)
    assert pyplot.get_fignums() == [figure.number]  # no other figure was made
    figure.canvas.draw()


def test_plot_after_a_journey_through_json():
    plan = a_plan(["s"], num_blocks=4)
    assert PruningPlan.from_json(plan.to_json()).plot().get_title() == plan.plot().get_title()


def test_plot_refuses_what_it_cannot_place(monkeypatch):
    from matplotlib import pyplot

    plan = a_plan()
    with pytest.raises(ConfigError, match=r"no stack 'enc'\. Its stacks: enc\.block, dec\.block"):
        plan.plot(stack="enc")
    with pytest.raises(ConfigError, match="ax is a place for one stack, and the plan has 2"):
        plan.plot(ax=pyplot.gca())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "deeparc_hf\[plots\]"'):
        plan.plot()


def test_views_are_part_of_what_the_documents_tell():
    text = (Path(__file__).parents[1] / "docs" / "without_trainer.md").read_text("utf-8")
    assert "plan.plot()" in text and "show as tables" in text and PruningPlan.plot.__doc__
