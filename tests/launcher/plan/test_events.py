"""What a plan lists and counts of a start from a checkpoint, and of transitions."""

from plans import plan_of

from launcher.plan.events import events
from launcher.plan.sources import drawn_by_source
from launcher.plan.table import describe, plan_rows
from launcher.plan.traffic import describe_traffic


def test_what_a_start_leaves_out_is_not_counted():
    begun = ["checkpoint.interval_steps=3", "checkpoint.start_from=model", "checkpoint.start_phase=1"]
    whole, late = plan_of(begun[0]), plan_of(*begun)
    assert (whole.first_step, late.first_step) == (0, 4)
    assert late.total_flops == whole.total_flops * 6 // 10
    assert drawn_by_source(late)[0]["tokens"] == drawn_by_source(whole)[1]["tokens"]
    numbers, of_whole = describe(late), describe(whole)
    assert of_whole["checkpoints_written"] - numbers["checkpoints_written"] == 2  # at steps 3 and 4
    assert [phase["is_trained"] for phase in numbers["phases"]] == [False, True]
    rows = dict(plan_rows(numbers | describe_traffic(late) | {"events": events(late), "counted_as": {}}))
    assert rows["phase 0: 16-bit"].endswith(", done before")
    assert not rows["phase 1: ternary"].endswith(", done before")


def test_every_choice_of_a_transition_is_listed():
    transition = "{schedule: restart, data: restart, rewarm_tokens: 193, optimizer: reset, weights: averaged}"
    averaging = "averaging.half_life_tokens=1000"
    listed = [each["what"] for each in events(plan_of(f"phases.1.transition={transition}", averaging))]
    for what in (
        "the optimizer is reset",
        "the phase begins with the averaged weights",
        "the data begin anew",
        "the learning rate begins its schedule anew",
        "the learning rate is warmed up anew, until step 6",
    ):
        assert what in listed
    begun = plan_of("checkpoint.start_from=model", "phases.0.transition.optimizer=reset")
    assert {"step": 0, "what": "the optimizer is reset"} in events(begun)
