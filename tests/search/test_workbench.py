"""Models with blocks left out and repaired, against real removals and real repairs, over every kind of model."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

from deeparc_hf import remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.healing.fit import SiteFit
from deeparc_hf.healing.heal import apply_healing, find_endings
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.healing.sites import sites_of
from deeparc_hf.observe.axes import find_axes
from deeparc_hf.observe.batches import batch_size, cut
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.observe.hooks import hooked, skipped
from deeparc_hf.observe.outputs import heads_of
from deeparc_hf.search.objectives import objectives
from deeparc_hf.search.objectives.divergence import relative_errors
from deeparc_hf.search.playback import Playback
from deeparc_hf.search.workbench import FOLDS, Workbench, by_stack
from tests.zoo import ZOO

FIRST = ("bert", "gpt2", "resnet", "t5", "timm_convnext", "vit", "whisper")
KINDS = [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(ZOO)]


def bench_of(model, batches, heals=True, objective="divergence"):
    subject = describe(model)
    inputs = list(Calibration(batches, 10**6).inputs(subject.host))
    return Workbench(subject, inputs, objectives.get(objective)(), heals=heals)


def free_blocks(model):
    return [(s.name, i) for s in describe(model).stacks.values() for i in range(1, len(s)) if i not in s.pinned]


def really(model, batches, removed, heals=True):
    """The same by whole passes, real removals from copies, and repairs fitted site after site, by fold; losses over
    weights.
    """
    whole = describe(model)
    inputs = list(Calibration(batches, 10**6).inputs(whole.host))
    if len(inputs) < 2 * FOLDS:  # of each batch a part in each fold
        size = batch_size(inputs[0]) // FOLDS
        folds = [[cut(batch, range(k * size, (k + 1) * size)) for batch in inputs] for k in range(FOLDS)]
    else:
        folds = [inputs[k::FOLDS] for k in range(FOLDS)]
    fits = crosswise(whole, folds, removed) if heals else []
    kept = {name: [i for i in range(len(s)) if (name, i) not in removed] for name, s in whole.stacks.items()}
    losses, weights = 0.0, 0.0
    for number, fold in enumerate(folds):
        smaller = copy.deepcopy(model)
        remove_blocks(smaller, by_stack(removed), verify=False)
        pruned = describe(smaller)
        with Transaction() as undo, evaluating(model), evaluating(smaller):
            for site, fit in fits:
                block = pruned.stacks[site.stack].blocks[kept[site.stack].index(site.kept)]
                apply_healing(fit.folds[number], block, undo)
            for inputs in fold:
                wanted, found = (
                    heads_of(each.host, each.root(**each.host.inputs_in(inputs)), inputs) for each in (whole, pruned)
                )
                found = relative_errors(found, wanted)
                losses, weights = losses + found[0].sum(dim=1), weights + found[1].sum(dim=1)
    return float((losses / weights).sum())


def crosswise(subject, folds, removed):
    """The repairs at each site, each fold's fitted on the others: a pass through the model as it is, and one through
    the model with what is removed before the site and the repairs of the fold.
    """
    host, stacks, fits = subject.host, subject.stacks, []
    order, pairs = list(stacks), list(zip(*folds, strict=True))
    with evaluating(subject.root):
        endings = find_endings(
            host, [block for stack in stacks.values() for block in stack.blocks], cut(pairs[0][0], 2)
        )
        axes = find_axes(host, list(stacks.values()), pairs[0][0])
        for site in sorted(sites_of(by_stack(removed)), key=lambda site: (order.index(site.stack), site.kept)):
            stack = stacks[site.stack]
            watch = SiteFit(host, stack, site, folds=FOLDS)
            watch.settle([endings[watch.kept], endings[watch.last]])
            watch.orient(axes[site.stack])
            before = [b for b in removed if (order.index(b[0]), b[1]) < (order.index(site.stack), site.kept)]
            for number, inputs in [(number, inputs) for pair in pairs for number, inputs in enumerate(pair)]:
                if watch.reason is not None:
                    break
                with hooked(watch.hooks("last")):
                    found = output_sensitivities(host, {watch.last: watch.axes.features}, inputs)
                    if found is None:
                        host.root(**inputs)
                with ExitStack() as inside:
                    undo = Transaction()
                    inside.callback(undo.roll_back)
                    for earlier, fit in fits:
                        apply_healing(fit.folds[number], stacks[earlier.stack].blocks[earlier.kept], undo)
                    for name, index in before:
                        inside.enter_context(skipped(stacks[name], index, must_run=False))
                    with hooked(watch.hooks("kept")), torch.no_grad():
                        host.root(**inputs)
                watch.take(inputs, 0, None if found is None else found.get(watch.last), fold=number)
            fits.append((site, watch.cross([watch.part()])))
    return fits


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_blocks_left_out_is_the_one_after_a_removal(kind):
    model = ZOO[kind].model().eval()
    batches = ZOO[kind].batches(count=4)
    free = free_blocks(model)
    with evaluating(model):
        bench = bench_of(model, batches)
        first = bench.follow(frozenset(free[:1]), bench.root)
        two = bench.follow(frozenset({free[0], free[-1]}), first)  # from a known model, not from the beginning
        back = bench.follow(frozenset(free[-1:]), two)
    assert bench.root.score.value == pytest.approx(0.0, abs=1e-6)
    for node in (first, two, back):
        assert node.score.value == pytest.approx(really(model, batches, node.removed), rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "resnet", "t5"])
def test_the_model_that_is_made_has_the_repairs_that_are_fitted_on_all(kind):
    model, batches = ZOO[kind].model().eval(), ZOO[kind].batches(count=4)
    free, whole = free_blocks(model), describe(model)
    removed = frozenset({free[0], free[-1]})
    with evaluating(model):
        bench = bench_of(model, batches)
        made = bench.make(bench.follow(removed, bench.root))
    folds = [[cut(batch, range(2 * k, 2 * k + 2)) for batch in batches] for k in range(FOLDS)]
    folds = [list(Calibration(fold, 10**6).inputs(whole.host)) for fold in folds]
    expected = copy.deepcopy(model)
    remove_blocks(expected, by_stack(removed), verify=False)
    stacks = describe(expected).stacks
    with Transaction() as undo:
        for site, fit in crosswise(whole, folds, removed):
            place = [i for i in range(len(whole.stacks[site.stack])) if (site.stack, i) not in removed].index(site.kept)
            apply_healing(fit.whole, stacks[site.stack].blocks[place], undo)
    states = made.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_as_many_samples_are_used_as_memory_is_meant_for(monkeypatch):
    """Twice what 4 blocks put out, 10 positions of 32 floats each, and two logits, for every sample."""
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches(count=6)
    each = 2 * 4 * 10 * 32 * 4 + 2 * 4
    for room, used in ((10**9, 48), (each * 30, 24), (each, 8)):
        monkeypatch.setattr("deeparc_hf.search.workbench.MEMORY", room)
        with evaluating(model):
            assert bench_of(model, batches).samples == used


@pytest.mark.parametrize("kind", ["bert", "t5", "resnet"])
def test_screening_a_block_where_nothing_is_repaired_behind_it_is_exact(kind):
    model = ZOO[kind].model()
    with evaluating(model):
        bench = bench_of(model, ZOO[kind].batches(count=2))
        free = free_blocks(model)
        scores = bench.screen(bench.root, free)
        full = bench.complete(scores)
        assert 3 <= len(full) <= len(free) and list(full.values()) == sorted(full.values(), key=lambda s: s.value)
        for block, score in full.items():
            assert bench.follow(frozenset({block}), bench.root).score.value == pytest.approx(
                score.value, rel=1e-4, abs=1e-9
            )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "resnet"])
def test_candidates_that_are_screened_together_are_judged_as_each_alone(kind):
    """No repair of one, or of the model that they go on from, is in the way of another's."""
    model, batches = ZOO[kind].model(), ZOO[kind].batches(count=2)
    first, *others = free_blocks(model)
    with evaluating(model):
        bench = bench_of(model, batches)
        base = bench.follow(frozenset({first}), bench.root)
        assert base.repairs
        for order in (others, others[::-1]):
            for block, score in bench.complete(bench_of(model, batches).screen(base, order)).items():
                alone = bench_of(model, batches).screen(base, [block])[block]
                assert alone.value == pytest.approx(score.value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_where_blocks_hand_on_something_else_every_pass_is_a_whole_one(kind):
    """The third block is given a part of what the first one put out, past the second. Repairs must be fitted on what
    the model gave without any.
    """
    model, batches, seen = ZOO[kind].model(), ZOO[kind].batches(count=2), []
    (stack,) = describe(model).stacks.values()

    def note(module, args, output):
        seen[:] = [output if isinstance(output, torch.Tensor) else output[0]]

    def add(module, args):
        return (args[0] + 0.5 * seen[0], *args[1:])

    stack.blocks[0].register_forward_hook(note)
    stack.blocks[2].register_forward_pre_hook(add)
    with evaluating(model):
        subject = describe(model)
        assert not Playback.of(subject.host, dict(subject.stacks), batches[0]).can_begin_anywhere
        bench = bench_of(model, batches)
        nodes = [bench.follow(frozenset(blocks), bench.root) for blocks in ([(stack.name, 1)], bench.order[1::2])]
        scores = bench.complete(bench.screen(nodes[0], [bench.order[3]]))
    for node in nodes:
        assert node.score.value == pytest.approx(really(model, batches, node.removed), rel=2e-3, abs=1e-7)
    assert next(iter(scores.values())).value == pytest.approx(nodes[1].score.value, rel=2e-3)


def test_hidden_states_that_a_model_puts_out_are_no_obstacle():
    model = ZOO["bert"].model()
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    inputs = ZOO["bert"].batches(count=1)[0]
    with evaluating(model):
        subject = describe(model)
        assert Playback.of(subject.host, dict(subject.stacks), inputs).can_begin_anywhere


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_fail_together(tmp_path):
    torch.multiprocessing.spawn(_in_two_processes, (str(tmp_path),), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = _tried(ZOO["bert"].model(), shared=False)
    assert two[0]["found"] == two[1]["found"] and two[0]["found"].keys() == alone.keys()
    assert all(two[0]["found"][block] == pytest.approx(value, rel=1e-4) for block, value in alone.items())
    assert "not here" in two[1]["error"] and "In process 1" in two[0]["error"]


def _tried(model, shared):
    with evaluating(model):
        bench = _bench(model, shared)
        free = free_blocks(model)
        base = bench.follow(frozenset(free[:1]), bench.root)
        return {index: score.value for (_, index), score in bench.screen(base, free[1:]).items()}


def _bench(model, shared):
    subject = describe(model)
    inputs = list(Calibration(ZOO["bert"].batches(count=2), 10**6).inputs(subject.host))
    return Workbench(subject, inputs, objectives.get("divergence")(), shared=shared)


def _in_two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = ZOO["bert"].model()
    found, error = _tried(model, shared=True), ""
    with evaluating(model):
        bench = _bench(model, shared=True)
        if rank == 1:
            model.classifier.register_forward_pre_hook(_not_here)
        try:
            bench.follow(frozenset(free_blocks(model)[:1]), bench.root)
        except Exception as caught:
            error = str(caught)
    torch.save({"found": found, "error": error}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _not_here(module, args):
    raise ValueError("not here")


def test_ctrl_c_while_repairs_are_taken_back_leaves_none(monkeypatch):
    model = ZOO["bert"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, calls = Transaction.roll_back, []

    def interrupted(self):
        plain(self)
        calls.append(self)
        if len(calls) == stop:
            raise KeyboardInterrupt

    for stop in range(1, 12):
        calls.clear()
        with monkeypatch.context() as patch, evaluating(model):
            bench = bench_of(model, ZOO["bert"].batches(count=2))
            patch.setattr(Transaction, "roll_back", interrupted)
            try:
                node = bench.follow(frozenset(free_blocks(model)[::2]), bench.root)
                bench.screen(node, free_blocks(model)[1:2])
            except KeyboardInterrupt:
                pass
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), stop
