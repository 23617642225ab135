"""CONTRIBUTING.md: the map leads somewhere, and the example files are complete, and as good as those in the package."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, RegNetConfig, RegNetForImageClassification

from deeparc_hf import analyze, apply_plan, find_stacks, remove_blocks, search_blocks
from deeparc_hf.architectures import describe, families
from deeparc_hf.errors import SurgeryError
from deeparc_hf.search.objectives import objectives
from deeparc_hf.search.strategies import strategies
from deeparc_hf.similarity import metrics
from deeparc_hf.sparsity.masks import choose_lowest
from deeparc_hf.sparsity.methods import methods
from tests.zoo import ZOO, batch, spread

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
_FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLES = dict(_FILE.findall(CONTRIBUTING.read_text("utf-8")))


@pytest.fixture
def example(tmp_path, request):
    """Writes the example of that folder to a file, imports it as a module of the package, and takes it out again
    afterwards.
    """

    def load(folder: str, registry):
        ((path, source),) = [item for item in EXAMPLES.items() if f"/{folder}/" in item[0]]
        file = tmp_path / Path(path).name
        file.write_text(source, "utf-8")
        name = path.removesuffix(".py").replace("/", ".")
        known = set(registry.names())
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)

        def unregister():
            del sys.modules[name]
            for added in set(registry.names()) - known:
                registry.unregister(added)

        request.addfinalizer(unregister)
        spec.loader.exec_module(module)
        (added,) = set(registry.names()) - known
        return registry.get(added)

    return load


def tiny_regnet() -> RegNetForImageClassification:
    config = RegNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 48],
        depths=[2, 3, 4, 2],
        groups_width=8,
        num_labels=5,
        layer_type="x",
    )
    return spread(RegNetForImageClassification(config)).eval()


def images(count: int = 40) -> dict[str, torch.Tensor]:
    return batch("image", count, torch.Generator().manual_seed(1))


def test_every_page_has_an_example_that_is_not_in_the_package_yet():
    assert len(EXAMPLES) == 5
    for path, source in EXAMPLES.items():
        assert not (CONTRIBUTING.parent / path).exists()
        assert all(len(line) <= 120 for line in source.splitlines())


def test_the_map_answers_sixteen_questions_with_files_that_are_there():
    rows = re.findall(r"^\| \.\.\. (.*\?) \| (.*) \|$", CONTRIBUTING.read_text("utf-8"), re.MULTILINE)
    assert len({question for question, _ in rows}) == 16
    for _, answer in rows:
        files = re.findall(r"`(deeparc_hf/[\w/]+\.py)`", answer)
        assert files and all((CONTRIBUTING.parent / file).is_file() for file in files)


def test_the_layers_are_those_that_are_enforced():
    (written,) = re.findall(r"enforces them:\n\n((?:    .*\n)+)", CONTRIBUTING.read_text("utf-8"))
    settings = tomllib.loads((CONTRIBUTING.parent / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers"]
    named = [re.sub(r"\s*\|\s*", " | ", layer.replace("deeparc_hf.", "").replace(" : ", ", ")) for layer in layers]
    lines = [re.sub(r"(\w)\s{2,}(\w)", r"\1 | \2", line.strip()) for line in written.splitlines()]
    assert lines == [layer for layer in named if layer != "__main__"]


def test_the_family_of_the_example_is_described_by_auto_without_it(example):
    assert describe(tiny_regnet()).family.name == "auto"
    without = find_stacks(tiny_regnet())
    example("architectures", families)
    assert describe(tiny_regnet()).family.name == "regnet"
    assert {name: dict(stack.pinned) for name, stack in find_stacks(tiny_regnet()).items()} == {
        name: dict(stack.pinned) for name, stack in without.items()
    }


def test_the_example_family_finds_stacks_and_pins(example):
    family = example("architectures", families)
    assert family.summary
    stacks = find_stacks(tiny_regnet())
    assert {name: len(stack) for name, stack in stacks.items()} == {
        f"regnet.encoder.stages.{i}.layers": length for i, length in enumerate([2, 3, 4, 2])
    }
    assert all(set(stack.pinned) == {0} for stack in stacks.values())


def test_the_example_family_removes_planted_identities_and_reloads(example, tmp_path):
    example("architectures", families)
    model, data = tiny_regnet(), images()
    planted = {"regnet.encoder.stages.1.layers": (2,), "regnet.encoder.stages.2.layers": (1, 3)}
    for name, indices in planted.items():
        for index in indices:
            norm = model.get_submodule(name)[index].layer[2].normalization
            torch.nn.init.zeros_(norm.weight)
            torch.nn.init.zeros_(norm.bias)
    with torch.no_grad():
        before = model(**data).logits
    plan = analyze(model, [data], threshold=0.9999, linkage="adjacent", progress=False)
    assert plan.removed == planted
    apply_plan(model, plan)
    assert model.config.depths == [2, 2, 2, 2]
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, before, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "pruned")
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**data).logits, before, atol=1e-5, rtol=0)


def test_the_example_family_refuses_to_lose_a_pinned_block(example):
    example("architectures", families)
    model = tiny_regnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="pinned"):
        remove_blocks(model, {"regnet.encoder.stages.2.layers": [0]})
    assert model.config.depths == [2, 3, 4, 2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def rows_of_blocks(count: int = 50, blocks: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, 6, generator=generator) + index for index in range(blocks)]


def fed(metric, rows: list[torch.Tensor], portions: list[int]):
    instance, start = metric(), 0
    for size in portions:
        instance.update([block[start : start + size] for block in rows], torch.arange(start, start + size))
        start += size
    return instance.finish()


def test_the_example_metric_equals_a_loop_over_rows(example):
    metric = example("similarity", metrics)
    rows = rows_of_blocks()
    matrix = metric.matrix(fed(metric, rows, [50]))
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            distances = [
                math.dist(x, y) / (math.hypot(*x) + math.hypot(*y))
                for x, y in zip(left.tolist(), right.tolist(), strict=True)
            ]
            assert float(matrix[i, j]) == pytest.approx(1 - sum(distances) / len(distances), abs=1e-9)


def test_the_example_metric_keeps_the_contract(example):
    metric = example("similarity", metrics)
    rows = rows_of_blocks()
    whole = metric.matrix(fed(metric, rows, [50]))
    assert whole.dtype == torch.float64 and whole.shape == (4, 4) and metric.summary
    torch.testing.assert_close(whole, whole.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(metric.matrix(fed(metric, rows, [7, 1, 30, 12])), whole, atol=1e-9, rtol=0)
    parts = [fed(metric, [block[chosen] for block in rows], [25]) for chosen in (slice(0, 25), slice(25, 50))]
    added = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    torch.testing.assert_close(metric.matrix(added), whole, atol=1e-9, rtol=0)


def test_the_example_metric_finds_a_planted_identity(example):
    metric = example("similarity", metrics)
    specimen = ZOO["bert"]
    model = specimen.model()
    layer = model.bert.encoder.layer[2]
    for linear in (layer.attention.output.dense, layer.output.dense):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    plan = analyze(model, specimen.batches(), similarity=metric.name, num_blocks=3, progress=False)
    assert plan.removed == {"bert.encoder.layer": (2,)}


def test_the_example_objective_counts_other_choices(example):
    objective = example("search/objectives", objectives)
    assert objective.summary and objective.unit
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches(8)
    frontier = search_blocks(
        model, batches, objective=objective.name, heal=None, num_blocks=3, measure_times=False, progress=False
    )
    smaller = copy.deepcopy(model)
    remove_blocks(smaller, frontier.points[1].removed)
    with torch.no_grad():
        choices = [
            torch.cat([each(**batch).logits.argmax(dim=1) for batch in batches]) for each in (model.eval(), smaller)
        ]
    assert frontier.whole.value == 0
    assert frontier.points[1].value == pytest.approx(float((choices[0] != choices[1]).double().mean()))


def test_the_example_search_goes_from_the_end(example):
    strategy = example("search/strategies", strategies)
    specimen = ZOO["t5"]
    frontier = search_blocks(
        specimen.model(), specimen.batches(), search=strategy.name, num_blocks=3, measure_times=False, progress=False
    )
    assert strategy.summary and strategy.passes(5, 4, repaired=True) > 1 and frontier.search == "from_the_end"
    assert frontier.points[-1].removed == {"decoder.block": (1, 2), "encoder.block": (2, 3)}


def test_the_example_sparsity_method_scores_and_chooses(example):
    method = example("sparsity", methods)()
    assert method.summary and not method.needs_inputs
    weight = torch.tensor([[1.0, -8.0, 0.0], [3.0, 8.0, 0.0]])
    score = method.score(weight)
    torch.testing.assert_close(score, torch.tensor([[0.5, 1.0, 0.0], [1.5, 1.0, 0.0]]))
    assert choose_lowest(score, 0.67).tolist() == [[True, False, True], [False, True, True]]
