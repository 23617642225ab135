"""The life of a training with prunings in it, by itself: toy trainings of a world without a model, each run whole, run
again with the machine rebuilt from its JSON at every event, and compared with a few lines that say what is expected.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import RecordError
from deeparc_hf.reports.attempts import BEFORE, FINISHED, RETRAINING, Attempt, Evaluation
from deeparc_hf.trainer.machine import Machine, Phase, Progress, judge

PER_EPOCH = 2  # optimizer steps
BASELINE, ALLOWED = 0.9, 0.05


class NoMetricError(Exception):
    pass


class Toy:
    """A model of four blocks. Iteration i removes one block of what is left at stride 1; larger strides remove others.

    Attributes:
        did: what was done to it, in order.
        blocks: number of blocks, of the model as it is and of those that it can go back to.
    """

    def __init__(self, config, least=1, others=False):
        self.config, self.least, self.others = config, least, others
        self.did, self.blocks, self.verdicts = [], [4], []
        self.progress = None

    def compare(self, iteration, k):
        self.did.append(("compare", iteration))
        return self._plan(k, self.blocks[-1] - 1) if self.blocks[-1] > self.least else None

    def weaker(self):
        k = self.progress.k + 1
        return self._plan(k, self.blocks[-1]) if k <= self.config.k_max else None

    def _plan(self, k, left):
        return {"config": {"k": k}, "left": left}

    def prune(self, plan, step):
        self.blocks.append(plan["left"])
        self.did.append(("prune", plan["config"]["k"], step))

    def rewind(self, step, steps):
        self.did.append(("rewind", step, steps))

    def pruned(self):
        assert self.progress.phase is Phase.RETRAINING and self.progress.k == self.did[-2][1]

    def judged(self, verdict):
        self.verdicts.append(verdict)

    def accept(self):
        self.did.append(("accept",))
        self.blocks = [self.blocks[-1]]

    def take_back(self):
        self.did.append(("take back",))
        self.blocks.pop()

    def carried_out(self, accepted):
        assert self.progress.verdict is None and self.progress.phase in (Phase.WAITING, Phase.DONE)

    def nothing_removed(self):
        self.did.append(("nothing to remove",))

    def others_go_on(self):
        return self.others

    def no_metric(self):
        return NoMetricError()


def as_first_version(data):
    """A progress as the first version of the format had it, which forgot the plan that comes next."""
    kept = {key: value for key, value in data.items() if key not in ("verdict", "goes_on", "next_plan", "asked_at")}
    phase, verdict = data["phase"], data["verdict"]
    named = {"waiting": BEFORE, "retraining": RETRAINING, "done": FINISHED}
    kept["phase"] = named.get(phase) or (RETRAINING if data["goes_on"] else FINISHED)
    # where nobody judges, a pruning that others follow had no verdict
    decision = None if verdict is None else "accept" if verdict else "reject"
    return {**kept, "decision": decision, "pruned_at": None, "format_version": 1}


def play(config, worth, epochs, *, cut=None, version=2, zeroed=None, first="pruning", ends=None, often=False, **toy):
    """One training.

    Args:
        worth: the metric, by the number of times that a pruning was tried (0: the model before).
        cut: number of the event before which the run is killed: all that is left of the machine is its JSON.
        zeroed: epoch at whose end weights are zeroed; first: which of the two callbacks comes first in the list.
        ends: epoch after which the training ends early.
        often: an evaluation after each step, whose figure says nothing before the end of the retraining.

    Returns:
        What was done, the state at the end, the number of blocks, and the number of events.
    """
    world, event = Toy(config, **toy), itertools.count(1)
    world.progress = Progress(k=config.k)
    count = 0

    def machine():
        nonlocal count
        count = next(event)
        if count == cut:
            data = json.loads(json.dumps(world.progress.to_dict()))
            world.progress = Progress.from_dict(as_first_version(data) if version == 1 else data)
        made = Machine(
            config,
            world.progress,
            world,
            metric="accuracy",
            greater_is_better=True,
            max_steps=epochs * PER_EPOCH,
            retraining=config.retrain_epochs * PER_EPOCH,
        )
        if count == cut:
            made.resume(changed=False)
        return made

    machine().begin(config.start_epoch * PER_EPOCH)
    step = 0
    while step < epochs * PER_EPOCH and not world.progress.stopped:
        machine().epoch_begins(step)
        if world.progress.stopped:
            break
        for left in reversed(range(PER_EPOCH)):
            step += 1
            tries = sum(done[0] == "prune" for done in world.did)
            value = worth(tries) if world.blocks[-1] < 4 or len(world.blocks) > 1 else BASELINE
            if left and often and config.gated:
                machine().evaluated(step, 0.0 if world.progress.phase is Phase.RETRAINING else BASELINE)
        for callback in ("pruning", "zeroing") if first == "pruning" else ("zeroing", "pruning"):
            if callback == "pruning":
                machine().epoch_ends(step)
            elif zeroed == step // PER_EPOCH:
                machine().weights_zeroed()
        if machine().wants_evaluation(step) or (often and config.gated):
            machine().evaluated(step, value)
            assert not machine().wants_evaluation(step)
        if ends == step // PER_EPOCH:
            break
    machine().training_ends(step)
    return world.did, world.progress.to_dict(), world.blocks[-1], count


def expected(config, worth, epochs, least=1):
    """The prunings and verdicts of a run that is neither disturbed nor ended early: (iteration, k, step, accepted)."""
    found, at, k, accepted, blocks = [], config.start_epoch, config.k, 0, 4
    while blocks > least:
        last = not config.gated and accepted + 1 == config.iterations
        good = not config.gated or BASELINE - worth(len(found) + 1) <= ALLOWED
        found.append((accepted + 1, k, at * PER_EPOCH, good))
        at = epochs if last else at + config.retrain_epochs
        accepted, blocks, k = accepted + good, blocks - good, k + (not good)
        if last or accepted == config.iterations or k > config.k_max:
            break
        if config.gated and at + config.retrain_epochs > epochs:
            break
    return found


def verdicts(did):
    """The same of a run that was played."""
    found = []
    accepted = 0
    for done in did:
        if done[0] == "prune":
            found.append([accepted + 1, *done[1:], None])
        elif done[0] in ("accept", "take back"):
            assert found[-1][-1] is None, "one verdict for each pruning"
            found[-1][-1] = done[0] == "accept"
            accepted += found[-1][-1]
    return [tuple(entry) for entry in found]


def schedule(gated, iterations, start, k_max, retraining=1):
    gate = {"max_drop": ALLOWED, "metric": "accuracy", "k_max": k_max} if gated else {}
    if gated and start == 0:
        gate["baseline"] = BASELINE
    return MPruneConfig(threshold=0.9, start_epoch=start, iterations=iterations, retrain_epochs=retraining, **gate)


WORTHS = {
    "all good": lambda tries: 0.88,
    "all bad": lambda tries: 0.1,
    "first good": lambda tries: 0.88 if tries == 1 else 0.1,
    "second good": lambda tries: 0.88 if tries == 2 else 0.1,
    "not finite": lambda tries: float("-inf"),
}
SCHEDULES = [
    schedule(*values)
    for values in itertools.product((True, False), (1, 2, 3), (0, 1), (1, 3), (1, 2))
    if values[0] or values[3] == 1
]


def names(config):
    gate = f"gated to k={config.k_max}" if config.gated else "free"
    return f"{gate}, {config.start_epoch}+{config.iterations}x{config.retrain_epochs}"


def lengths(config):
    """Epochs that fit just, and those with room for other tries."""
    needed = config.start_epoch + config.iterations * config.retrain_epochs
    return needed, needed + 3


@pytest.mark.parametrize("config", SCHEDULES, ids=names)
def test_a_whole_run_does_what_is_expected(config):
    for worth, epochs, often, least in itertools.product(WORTHS.values(), lengths(config), (False, True), (1, 2, 3)):
        did, state, blocks, _ = play(config, worth, epochs, often=often, least=least)
        wanted = expected(config, worth, epochs, least)
        assert verdicts(did) == wanted
        assert state["phase"] == "done" and state["verdict"] is None and state["reason"]
        assert state["accepted"] == sum(entry[-1] for entry in wanted) == 4 - blocks


@pytest.mark.parametrize("config", SCHEDULES, ids=names)
def test_a_run_that_is_cut_at_any_event_ends_as_the_whole_one(config):
    for worth, epochs, others in itertools.product(WORTHS.values(), lengths(config), (False, True)):
        *whole, events = play(config, worth, epochs, others=others)
        for cut in range(2, events + 1):
            *again, _ = play(config, worth, epochs, others=others, cut=cut)
            assert again == whole, cut


@pytest.mark.parametrize("config", SCHEDULES, ids=names)
def test_a_run_with_weights_zeroed_in_it_or_ended_early_is_resumed_too(config):
    worth, epochs = WORTHS["second good"], lengths(config)[1]
    for zeroed, first, ends in itertools.product((None, 1, 2), ("pruning", "zeroing"), (None, 1, 2, 3)):
        how = {"zeroed": zeroed, "first": first, "ends": ends}
        *whole, events = play(config, worth, epochs, **how)
        assert whole[1]["phase"] == "done" and whole[1]["verdict"] is None and None not in verdicts(whole[0])
        for cut in range(2, events + 1):
            *again, _ = play(config, worth, epochs, cut=cut, **how)
            assert again == whole, (how, cut)


@pytest.mark.parametrize("config", SCHEDULES, ids=names)
def test_a_run_that_the_first_version_of_the_format_saved_goes_on(config):
    """It compares once more where the plan that comes next was not kept."""
    for worth, epochs in itertools.product(WORTHS.values(), lengths(config)):
        did, state, blocks, events = play(config, worth, epochs)
        for cut in range(2, events + 1):
            again, end, left, _ = play(config, worth, epochs, cut=cut, version=1)
            assert [done for done in again if done[0] != "compare"] == [done for done in did if done[0] != "compare"]
            assert (end, left) == (state, blocks), cut


@pytest.mark.parametrize("end", [1, 2, 3])
def test_a_training_that_ends_early_ends_on_what_was_measured(end):
    config = schedule(True, 1, 1, 1, retraining=3)
    for worth, good in ((WORTHS["all good"], True), (WORTHS["all bad"], False)):
        for often in (False, True):
            did, state, blocks, _ = play(config, worth, 9, ends=end, often=often)
            pruned = end > 1
            assert verdicts(did) == ([(1, 1, PER_EPOCH, good and often)] if pruned else [])
            assert blocks == (3 if pruned and good and often else 4)
            assert state["reason"] == ("the training ended early" if pruned else "the training ended")


def made(config, phase=Phase.RETRAINING, max_steps=20, retraining=4, **fields):
    world = Toy(config)
    world.blocks = [4, 3]
    world.progress = Progress(k=1, phase=phase, boundary=8, **fields)
    machine = Machine(
        config,
        world.progress,
        world,
        metric="accuracy",
        greater_is_better=True,
        max_steps=max_steps,
        retraining=retraining,
    )
    return machine, world, world.progress


def test_what_was_not_judged_is_not_accepted():
    machine, world, _ = made(schedule(True, 1, 1, 1))
    with pytest.raises(NoMetricError):
        machine.epoch_begins(8)
    waiting, *_ = made(schedule(True, 1, 1, 1), phase=Phase.WAITING)
    with pytest.raises(NoMetricError):
        waiting.epoch_begins(8)
    assert not world.did


def test_the_best_checkpoint_that_was_loaded_is_judged_where_the_training_ends_early():
    for best, good in ((0.88, True), (0.2, False), (None, False)):
        machine, world, progress = made(schedule(True, 1, 1, 1), baseline=0.9, value=0.1)
        machine.training_ends(5, best)
        assert verdicts([("prune", 1, 4), *world.did]) == [(1, 1, 4, good)] and progress.goes_on is False
    assert "0.1" in world.verdicts[0].reason


def test_a_verdict_that_is_not_carried_out_when_the_training_ends_is_carried_out_then():
    for verdict in (True, False):
        machine, world, progress = made(schedule(True, 3, 1, 3), Phase.JUDGED, verdict=verdict, next_plan={"x": 1})
        machine.training_ends(8)
        assert world.did == [("accept",) if verdict else ("take back",)] and progress.phase is Phase.DONE
        assert progress.reason == "the training ended"


def test_the_training_goes_on_for_another_callback_at_a_learning_rate_of_its_own():
    config = schedule(True, 1, 1, 1)
    did, state, *_ = play(config, WORTHS["all good"], 5, others=True)
    assert did[-2:] == [("accept",), ("rewind", 4, 6)] and not state["stopped"]
    did, state, *_ = play(config, WORTHS["all good"], 5)
    assert did[-1] == ("accept",) and state["stopped"]


@pytest.mark.parametrize("verdict", [None, True])
def test_other_settings_on_a_resume_count_from_there_on(verdict):
    """The last of two prunings became the last of three, or the other way round, and nobody had judged it."""
    phase = Phase.RETRAINING if verdict is None else Phase.JUDGED
    for iterations, boundary in ((3, 8), (1, 20)):
        machine, _, progress = made(schedule(False, iterations, 1, 1), phase, verdict=verdict, next_plan={"x": 1})
        machine.resume(changed=True)
        assert (progress.phase, progress.boundary, progress.next_plan) == (Phase.RETRAINING, boundary, None)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize(
    ("fields", "lowered", "left", "reason"),
    [
        # rejected at k=2 with k=3 still to try, and now k_max is 2: it must not be tried at k=2 again
        ({"k": 2, "verdict": False}, {"k_max": 2}, 4, "no stride up to k_max=2 removes anything else"),
        # the second of three is accepted, and now two are all that is asked for
        (
            {"k": 1, "verdict": True, "accepted": 1},
            {"iterations": 2},
            3,
            "every pruning that was asked for is accepted",
        ),
    ],
    ids=["k_max", "iterations"],
)
def test_a_resume_that_asks_for_less_does_not_prune_again(fields, lowered, left, reason, others):
    machine, world, progress = made(schedule(True, 3, 1, 3).replace(**lowered), Phase.JUDGED, next_plan={"x": 1})
    world.others = others
    for name, value in fields.items():
        setattr(progress, name, value)
    machine.resume(changed=True)
    machine.epoch_begins(8)
    assert progress.phase is Phase.DONE and progress.reason == reason and world.blocks[-1] == left
    assert not any(done[0] == "prune" for done in world.did)
    assert progress.stopped is not others and (("rewind", 8, 12) in world.did) is others


def test_a_training_that_begins_again_retrains_from_its_first_step():
    for phase, verdict in ((Phase.RETRAINING, None), (Phase.JUDGED, False)):
        machine, world, progress = made(schedule(True, 1, 1, 1), phase, verdict=verdict, value=0.1, measured_at=8)
        machine.begin_again()
        assert (progress.phase, progress.boundary, progress.value) == (Phase.RETRAINING, 4, None)
        assert world.did == [("rewind", 0, 4)] and machine.wants_evaluation(8)


def test_a_first_comparison_that_finds_nothing_leaves_the_training_alone():
    did, state, blocks, _ = play(schedule(False, 2, 1, 1), WORTHS["all good"], 4, least=4)
    assert did == [("compare", 0), ("nothing to remove",)] and blocks == 4 and not state["stopped"]
    assert state["reason"] == "nothing can be removed"


def test_zeroing_while_a_pruning_waits_to_be_carried_out_has_the_blocks_compared_again():
    config = schedule(False, 2, 1, 1)
    for first in ("pruning", "zeroing"):
        did = play(config, WORTHS["all good"], 4, zeroed=2, first=first)[0]
        compared = [done for done in did if done[0] == "compare"]
        assert len(compared) == (3 if first == "pruning" else 2) and compared[-1] == ("compare", 1)


@pytest.mark.parametrize(
    ("config", "worth", "epochs", "least", "reason"),
    [
        (schedule(True, 1, 1, 1), "all good", 5, 1, "every pruning that was asked for is accepted"),
        (schedule(True, 1, 1, 3), "all bad", 2, 1, "there are not enough epochs left for one more retraining"),
        (schedule(True, 2, 1, 3), "all good", 3, 3, "nothing more can be removed"),
        (schedule(True, 1, 1, 1), "all bad", 5, 1, "no stride up to k_max=1 removes anything else"),
        (schedule(False, 3, 1, 1), "all good", 4, 3, "nothing more can be removed"),
    ],
)
def test_a_training_stops_where_nothing_is_left_to_do_and_says_why(config, worth, epochs, least, reason):
    state = play(config, WORTHS[worth], epochs, least=least)[1]
    assert (state["reason"], state["stopped"]) == (reason, True)


@pytest.mark.parametrize(("value", "good"), [(0.52, True), (0.6, False)])
def test_a_given_baseline_counts_and_smaller_may_be_better(value, good):
    config = MPruneConfig(threshold=0.9, retrain_epochs=1, max_drop=ALLOWED, baseline=0.5, k_max=1)
    world = Toy(config)
    world.progress = Progress(k=1)
    settings = {"metric": "loss", "greater_is_better": False, "max_steps": 4, "retraining": 2}
    machine = Machine(config, world.progress, world, **settings)
    machine.begin(0)
    assert not machine.wants_evaluation(0)
    machine.epoch_begins(0)
    machine.evaluated(2, value)
    machine.training_ends(2)
    assert verdicts(world.did) == [(1, 1, 0, good)] and world.verdicts[0].drop == pytest.approx(value - 0.5)


def test_the_words_of_a_report():
    told = [
        (Progress(k=1), BEFORE),
        (Progress(k=1, phase=Phase.RETRAINING), RETRAINING),
        (Progress(k=1, phase=Phase.JUDGED), RETRAINING),
        (Progress(k=1, phase=Phase.JUDGED, goes_on=False), FINISHED),
        (Progress(k=1, phase=Phase.DONE), FINISHED),
    ]
    assert all(progress.for_report()["phase"] == phase for progress, phase in told)


def test_the_machine_may_be_taken_back_as_long_as_a_verdict_is_not_carried_out():
    for phase in Phase:
        machine, *_ = made(schedule(True, 1, 1, 1), phase)
        assert machine.may_be_taken_back == (phase in (Phase.RETRAINING, Phase.JUDGED))
        assert not made(schedule(False, 1, 1, 1), phase)[0].may_be_taken_back


def test_the_module_itself_needs_no_torch():
    """Its package does: this reads the imports of the file alone."""
    import ast
    from pathlib import Path

    import deeparc_hf.trainer.machine as module

    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported <= {
        "__future__",
        "collections.abc",
        "core.checks",  # which imports none either
        "dataclasses",
        "enum",
        "typing",
        "errors",
        "reports.attempts",
    }


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "value", "greater", "accepted", "drop"),
    [
        (0.75, 0.875, True, True, -0.125),
        (0.75, 0.75, True, True, 0.0),
        (0.75, 0.625, True, True, 0.125),
        (0.75, 0.5, True, True, 0.25),  # exactly max_drop
        (0.75, 0.4999, True, False, 0.2501),
        (2.0, 1.0, False, True, -1.0),
        (2.0, 2.25, False, True, 0.25),
        (2.0, 2.2501, False, False, 0.2501),
        (-1.0, -1.25, True, True, 0.25),
        (-1.0, -0.5, False, False, 0.5),
    ],
)
def test_verdicts_in_both_directions(baseline, value, greater, accepted, drop):
    verdict = judge(MPruneConfig(max_drop=0.25), "score", baseline, value, greater)
    assert verdict.accepted is accepted
    assert verdict.drop == pytest.approx(drop)


@pytest.mark.parametrize(("baseline", "value"), [(0.9, 0.8), (0.8, 0.7), (0.95, 0.85), (0.6, 0.5)])
@pytest.mark.parametrize("greater", [True, False])
def test_a_drop_of_max_drop_in_decimal_figures_is_accepted(baseline, value, greater):
    # 0.8 - 0.7 is a little more than 0.1 in binary: the reason would say "worse by 0.1 (only a drop of up to 0.1 is
    # allowed)"
    pair = (baseline, value) if greater else (value, baseline)
    assert judge(MPruneConfig(max_drop=0.1), "score", *pair, greater).accepted


def test_max_drop_of_zero_allows_no_loss_at_all():
    config = MPruneConfig(max_drop=0)
    assert judge(config, "loss", 1.0, 1.0, False).accepted
    assert not judge(config, "loss", 1.0, 1.001, False).accepted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greater", [True, False])
def test_a_metric_that_is_not_finite_is_rejected(value, greater):
    assert not judge(MPruneConfig(max_drop=1e9), "loss", 1.0, value, greater).accepted


@pytest.mark.parametrize("greater", [True, False])
def test_a_baseline_that_is_nan_accepts_nothing(greater):
    assert not judge(MPruneConfig(max_drop=1e9), "loss", math.nan, 1.0, greater).accepted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reason_does_not_call_a_metric_better_that_is_not_finite(value):
    assert "better" not in judge(MPruneConfig(max_drop=0.1), "accuracy", 0.9, value, True).reason


def test_reason_tells_the_figures_and_the_bound():
    worse = judge(MPruneConfig(max_drop=0.05), "accuracy", 0.9, 0.6, True).reason
    for part in ("accuracy", "from 0.9 to 0.6", "worse by 0.3", "only a drop of up to 0.05 is allowed"):
        assert part in worse
    better = judge(MPruneConfig(max_drop=0.05), "loss", 0.9, 0.6, False).reason
    for part in ("loss", "better by 0.3", "(a drop of up to 0.05 is allowed)"):
        assert part in better


# --- progress ---------------------------------------------------------------------------------------------------------

# no field at its default, so that one which is lost on the way shows
FULL = Progress(
    k=2,
    phase=Phase.JUDGED,
    accepted=1,
    boundary=48,
    baseline=0.1 + 0.2,
    measured_at=40,
    asked_at=40,
    value=1e-17,
    verdict=False,
    next_plan={"config": {"k": 3}},
    goes_on=False,
    reason="loss went from 1 to 2 \u2014 \u201cworse\u201d",
    stopped=True,
    rewound=[24, 24],
    steps_per_epoch=8,
    start={"stacks": {}},
    base={"stacks": {"enc": {"length": 4, "kept": [0, 1, 3]}}},
    record={"stacks": {"enc": {"length": 4, "kept": [0, 3]}}},
    frozen={"enc": [0]},
    base_frozen={"enc": [1, 2]},
    snapshot="step-24",
    teacher="step-16",
    attempts=[
        Attempt("before pruning", {"enc": 4}, 9, evaluations=(Evaluation.of({"eval_loss": 0.5}, data={}, step=8),))
    ],
)


def test_the_planted_progress_leaves_no_field_at_its_default():
    fresh = Progress(k=1)
    assert all(getattr(FULL, spec.name) != getattr(fresh, spec.name) for spec in dataclasses.fields(Progress))


@pytest.mark.parametrize(
    "progress", [FULL, Progress(k=1), Progress(k=3, phase=Phase.DONE)], ids=["full", "fresh", "finished"]
)
def test_round_trip_through_json_text(progress):
    text = json.dumps(progress.to_dict())
    again = Progress.from_dict(json.loads(text))
    assert again == progress
    assert json.dumps(again.to_dict()) == text


def test_a_fresh_progress_waits_for_its_first_pruning():
    progress = Progress(k=1)
    assert (progress.phase, progress.accepted, progress.boundary, progress.stopped) == (Phase.WAITING, 0, 0, False)


def test_to_dict_is_a_copy():
    data = FULL.to_dict()
    data["frozen"]["enc"].append(7)
    data["attempts"][0]["evaluations"].clear()
    data["attempts"][0]["blocks"].clear()
    assert FULL.frozen == {"enc": [0]}
    assert len(FULL.attempts[0].evaluations) == len(FULL.attempts[0].blocks) == 1


def changed(**entries):
    return {**FULL.to_dict(), **entries}


FOREIGN = {
    "nothing": None,
    "a list": [FULL.to_dict()],
    "a text": json.dumps(FULL.to_dict()),
    "empty": {},
    "another callback's": {"args": {"early_stopping_patience": 3}, "attributes": {}},
    "no version": {key: value for key, value in FULL.to_dict().items() if key != "format_version"},
    "a later version": changed(format_version=3),
    "version as text": changed(format_version="2"),
    "the first version by name alone": changed(format_version=1),
    "an entry more": changed(colour="red"),
    **{
        f"no {name}": {key: value for key, value in FULL.to_dict().items() if key != name}
        for name in ("k", "phase", "attempts", "snapshot")
    },
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_progress_is_refused_with_advice(data):
    with pytest.raises(
        RecordError, match=r"trainer_state\.json.*another version of deeparc_hf.*Resume with the version that wrote it"
    ):
        Progress.from_dict(data)


def test_a_path_to_somewhere_else_is_no_name_of_a_snapshot():
    for name in ("../elsewhere", "a/b", "", 3):
        with pytest.raises(RecordError):
            Progress.from_dict(changed(snapshot=name))


FIRST = {"phase": RETRAINING, "decision": None, "pruned_at": 8}


@pytest.mark.parametrize(
    ("saved", "phase", "verdict", "goes_on"),
    [
        ({"phase": BEFORE}, "waiting", None, True),
        ({}, "retraining", None, True),
        ({"decision": "accept"}, "judged", True, True),
        ({"decision": "reject"}, "judged", False, True),
        ({"decision": "accept", "phase": FINISHED}, "judged", True, False),
        ({"decision": "reject", "phase": FINISHED}, "judged", False, False),
        ({"phase": FINISHED}, "done", None, False),
    ],
)
def test_every_phase_of_the_first_version_is_read(saved, phase, verdict, goes_on):
    first = {**as_first_version(FULL.to_dict()), **FIRST, **saved}
    progress = Progress.from_dict(json.loads(json.dumps(first)))
    assert (progress.phase, progress.verdict, progress.goes_on) == (phase, verdict, goes_on)
    same = ("k", "accepted", "boundary", "baseline", "reason", "stopped", "record", "snapshot", "attempts")
    assert all(getattr(progress, name) == getattr(FULL, name) for name in same)
    for odd in ({"decision": "?"}, {"phase": []}, {"k": None}, {"more": 1}):
        with pytest.raises(RecordError):
            Progress.from_dict({**first, **odd})
