"""The text of --glore and --block: places, placement and settings, and back to text."""

import inspect
import json

import pytest

from glore_common import UsageError
from network import Context, get_symbol
from network.builder import ALL_ROWS, OVERRIDES, UNIT_OVERRIDES, resolve
from network.identify import identify_network
from network.options import ArchitectureOptions
from network.placement import as_text, storable
from network.shapes import value_shapes
from network.symbol_context import CONTEXT_KINDS
from network.symbol_glore import UNIT_SETTINGS, GloRe_Unit


def graph(name, **overrides):
    return get_symbol(name, **overrides)[0].tojson()


def found(text, name="resnet50"):
    """Return (kind, settings, positions, inside) of each block that text asks for."""
    return [
        (c.kind, c.settings, dict(c.positions), c.inside) for c in resolve(name, block=text).context
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gc@c5/inside:ratio=1/4", [("gc", {"ratio": 0.25}, {5: (1, 2, 3)}, True)]),
        (
            "nl@4:5:mode=dot_product,sub_sample=true",
            [("nl", {"mode": "dot_product", "sub_sample": True}, {4: (5,)}, False)],
        ),
        (
            "NL@3:1,3;4:2/inside:ratio=0.25, sub_sample=no , gc@c4/after:ratio=1/8,snl",
            [
                ("nl", {"ratio": 0.25, "sub_sample": False}, {3: (1, 3), 4: (2,)}, True),
                ("gc", {"ratio": 0.125}, {4: (1, 2, 3, 4, 5, 6)}, False),
                ("snl", {}, {4: (5,)}, False),
            ],
        ),
        (
            "snl@4:1,se@5:2:ratio=1/2",
            [
                ("snl", {}, {4: (1,)}, False),
                ("se", {"ratio": 0.5}, {5: (2,)}, True),
            ],
        ),
    ],
)
def test_one_text_carries_everything(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize(
    ("overrides", "places", "unit"),
    [
        ({"glore": "2-3:num_node=16"}, {3: (1, 3), 4: (1, 3, 5)}, {"num_node": 16}),
        (
            {"glore": "3:1,3;4:5:num_state=8,normalize=true,flavour=video"},
            {3: (1, 3), 4: (5,)},
            {"num_state": 8, "normalize": True, "flavour": "video"},
        ),
        ({"glore": "c5:num_node=4"}, {5: (1, 2, 3)}, {"num_node": 4}),
        ({"glore": "glore@4:5:num_node=4"}, {4: (5,)}, {"num_node": 4}),
        ({"glore": "glore"}, {3: (1, 3), 4: (1, 3, 5)}, {}),
        ({"block": "glore@c4:num_node=16"}, {4: (1, 2, 3, 4, 5, 6)}, {"num_node": 16}),
        ({"block": "glore:num_node=16,gc@4:1"}, {3: (1, 3), 4: (1, 3, 5)}, {"num_node": 16}),
        ({"glore": "4:5", "block": "glore:normalize=on"}, {4: (5,)}, {"normalize": True}),
        ({"glore": "4:5:num_node=16", "num_node": 8}, {4: (5,)}, {"num_node": 8}),
    ],
)
def test_units_take_settings_in_the_text(overrides, places, unit):
    spec = resolve("resnet50", **overrides)
    assert (dict(spec.glore), spec.unit) == (places, unit)


def test_text_and_overrides_build_the_same_graph():
    text = "2-3:num_node=16,num_state=24,normalize=true,flavour=video"
    given = {"num_node": 16, "num_state": 24, "normalize": True, "glore_flavour": "video"}
    assert graph("resnet50", glore=text) == graph("resnet50", glore="2-3", **given)
    assert graph("resnet50", block=f"glore@{text}") == graph("resnet50", glore="2-3", **given)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block": "gc:ratoi=1/4"}, "block: gc has no setting 'ratoi'; it takes ratio"),
        ({"block": "nl:sub_sampel=true"}, "no setting 'sub_sampel'; it takes sub_sample, "),
        ({"block": "nl:sub_sample=maybe"}, "nl: sub_sample must be True or False, not 'maybe'"),
        ({"block": "nl:ratio=1/4,ratio=1/2"}, "nl names ratio twice"),
        ({"block": "gc@4:5:ratio"}, "block positions '4:5:ratio' are not understood"),
        ({"block": "gc:ratio=1/4,gc"}, "names a kind twice"),
        ({"block": "glore:num_node=x"}, "glore: num_node must be an integer of at least 1"),
        ({"block": "glore@9-1"}, "has 4 blocks in stage 3, too few for 9 units"),
        ({"glore": "2-3:nodes=16"}, "glore has no setting 'nodes'; it takes num_node"),
        ({"glore": "2-3:flavour=vidoe"}, "glore: flavour 'vidoe' is not one of: video"),
        ({"glore": "2-3/after"}, "is not understood"),
        ({"glore": "glorec4"}, "is not understood"),
        ({"glore": ""}, "is not understood"),
        ({"block": Context("gc", {"mode": "gaussian"})}, "gc has no setting 'mode'"),
    ],
)
def test_wrong_text_is_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        get_symbol("resnet50", **overrides)


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: row.name)
def test_the_blocks_of_every_row_can_be_written_as_text(row):
    text = as_text(row.context), as_text(dict(row.glore))
    again = resolve(row.name, block=text[0], glore=text[1])
    assert graph(row.name, block=text[0], glore=text[1]) == graph(row.name)
    assert (again.context == ()) == (row.context == ())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        ((), "none"),
        ({}, "none"),
        ({4: [5, 1], 3: (2,)}, "3:2;4:1,5"),
        ("gc@c4:ratio=1/4", "gc@c4:ratio=1/4"),
        (Context("snl"), "snl"),
        (Context("gc", {"ratio": "1/8"}, "c3-c5"), "gc@c3-c5:ratio=1/8"),
        (Context("gc", {"ratio": 0.1234567}, placement="after"), "gc/after:ratio=0.1234567"),
        (
            [Context("nl", {"ratio": 1 / 3, "sub_sample": True}, ((4, (5,)),)), "glore@2-3"],
            "nl@4:5:ratio=1/3,sub_sample=true,glore@2-3",
        ),
    ],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


def test_what_was_found_in_a_checkpoint_survives_json():
    given = {
        "block": "nl@4:2/inside:mode=concatenation,sub_sample=true,ratio=1/4,gc@4:1/after",
        "glore": "4:2:num_node=4,num_state=6,flavour=video",
        "crop_size": 64,
        "fixed_pool": False,
    }
    symbol, conf = get_symbol("resnet18", 7, **given)
    shapes = value_shapes(symbol, conf)
    names = symbol.list_arguments() + symbol.list_auxiliary_states()
    shapes = {n: shapes[n] for n in names if n not in ("data", "softmax_label")}
    overrides = identify_network(shapes, symbol).overrides
    stored = json.loads(json.dumps(storable(overrides)))
    rebuilt, _ = get_symbol("resnet18", 7, **stored)
    assert rebuilt.tojson() == symbol.tojson()


def test_settings_are_keywords_of_their_builders():
    for kind, row in CONTEXT_KINDS.items():
        keywords = inspect.signature(row.build).parameters
        for name, setting in row.settings.items():
            assert keywords[name].default == setting.default, (kind, name)
    keywords = inspect.signature(GloRe_Unit).parameters
    assert all(keywords[n].default == s.default for n, s in UNIT_SETTINGS.items())
    flags = {"glore", "block", "dropout", *UNIT_OVERRIDES}
    assert set(ArchitectureOptions(**dict.fromkeys(flags, "x")).overrides()) == flags
    assert flags <= set(OVERRIDES)
