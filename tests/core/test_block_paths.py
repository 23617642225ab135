import pytest

from deeparc_hf.core.block_paths import block_path, is_inside, lists_of, place_in, stack_name

JOINED = "transformer.{attentions,ffns}"


@pytest.mark.parametrize("lists", [("bert.encoder.layer",), ("transformer.attentions", "transformer.ffns"), ("a", "b")])
def test_a_name_tells_the_lists(lists):
    assert lists_of(stack_name(lists)) == lists


def test_names():
    assert stack_name(["bert.encoder.layer"]) == "bert.encoder.layer"
    assert stack_name(["transformer.attentions", "transformer.ffns"]) == JOINED


@pytest.mark.parametrize(
    ("stack", "path", "place"),
    [
        ("a.layer", "a.layer.3.q.weight", (3, "q.weight")),
        ("a.layer", "a.layer.3", (3, "")),
        ("a.layer", "a.layers.3.q.weight", None),
        ("a.layer", "a.layer.norm.weight", None),
        ("a.layer", "b.a.layer.3.q.weight", None),
        (JOINED, "transformer.attentions.0.q.weight", (0, "attentions.q.weight")),
        (JOINED, "transformer.ffns.11", (11, "ffns")),
        (JOINED, "transformer.norms.0.weight", None),
        (JOINED, "attentions.0.q.weight", None),
    ],
)
def test_what_is_in_a_block_is_found_and_named_again(stack, path, place):
    assert place_in(stack, path) == place
    if place is not None:
        assert block_path(stack, *place) == path and is_inside(stack, path)


def test_a_block_with_parts_in_several_lists_has_a_path_for_messages():
    assert block_path(JOINED, 3) == "transformer.{attentions,ffns}.3"


def test_what_is_beside_the_blocks_of_a_list_is_inside_of_it_but_in_no_block():
    assert is_inside("a.layer", "a.layer.norm.weight") and not is_inside("a.layer", "a.layer")
