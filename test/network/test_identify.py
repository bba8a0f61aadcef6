"""network.identify: a checkpoint's network is found from names, shapes and graph."""

import json

import pytest

from checkpoint.params import param_shapes
from mxnet_compat import mx
from network import get_symbol, list_networks
from network.identify import UnknownNetwork, identify_network


def built(name, num_classes=10, **overrides):
    symbol, input_conf = get_symbol(name, num_classes, **overrides)
    args, auxs = param_shapes(symbol, {"data": (1, *input_conf.data_shape)})
    return symbol, {**args, **auxs}


def nodes(symbol):
    graph = json.loads(symbol.tojson())["nodes"]
    return [(node["op"], node["name"], node.get("attrs"), node["inputs"]) for node in graph]


@pytest.mark.parametrize("name", list_networks(study=True))
def test_every_network_is_found_as_itself(name):
    symbol, shapes = built(name)
    found = identify_network(shapes, symbol)
    assert (found.name, found.num_classes, found.overrides) == (name, 10, {})


OVERRIDDEN = [
    ("resnet50", {"glore": {3: (2, 4), 4: (6,)}, "num_node": 16, "num_state": 24}),
    ("resnet50", {"fixed_pool": True, "bn_eps": 1e-5, "bn_momentum": 0.99, "dropout": 0.25}),
    ("resnet50_w-glore_2-3", {"glore": None}),
    ("resnet50_w-se", {"glore": "0-3", "normalize": True}),
    ("resnet18", {"block": "se", "glore": {5: (1,)}, "glore_flavour": "video"}),
    ("resnext101-32x4d", {"glore": {4: (1, 23)}}),
    ("dpn98", {"legacy_names": True}),
    ("dpn131", {"legacy_names": True, "glore": "2-3"}),
    ("dpn92", {"block": "se"}),
    ("RESNET50_3D", {"glore": "1-1"}),
]


@pytest.mark.parametrize(("name", "overrides"), OVERRIDDEN)
def test_overrides_are_found_node_by_node(name, overrides):
    symbol, shapes = built(name, **overrides)
    found = identify_network(shapes, symbol)
    again, same = built(found.name, found.num_classes, **found.overrides)
    assert same == shapes
    assert nodes(again) == nodes(symbol)


def test_what_was_found_is_told():
    found = identify_network(built("resnet50_w-se_w-glore_0-3")[1]).found
    assert found["blocks"] == (3, 4, 6, 3)
    assert found["num_mid"] == (64, 128, 256, 512)
    assert found["groups"] == 1
    assert found["GloRe units"] == {4: (1, 3, 5)}
    assert found["se blocks"] == 16
    assert identify_network(built("dpn98")[1]).found["growth"] == (16, 32, 32, 128)


def test_another_fixed_pooling_is_another_input_size():
    symbol, shapes = built("resnet18", fixed_pool=True)
    graph = json.loads(symbol.tojson())
    (pool,) = [node for node in graph["nodes"] if node["name"] == "global-pool"]
    pool["attrs"]["kernel"] = "(10, 10)"
    found = identify_network(shapes, mx.sym.load_json(json.dumps(graph)))
    assert found.overrides == {"crop_size": (320, 320)}


@pytest.mark.parametrize("name", ["resnet50_w-glore_2-3", "dpn98", "resnet18"])
def test_single_damaged_parameters_do_not_mislead(name):
    _, shapes = built(name)
    weights = [key for key in shapes if key.endswith(("conv_weight", "bn_gamma"))]
    for key in weights[1::9]:
        for damaged in ({**shapes, key: (5, *shapes[key][1:])}, without(shapes, key)):
            assert identify_network(damaged).name == name


def without(shapes, key):
    return {other: shape for other, shape in shapes.items() if other != key}


def test_prefixes_are_seen_through():
    _, shapes = built("resnet18_w-glore_1-1")
    found = identify_network({f"net_{name}": shape for name, shape in shapes.items()})
    assert found.name == "resnet18_w-glore_1-1"


def test_other_networks_say_what_they_are_and_what_is_near():
    _, shapes = built("resnet34")
    narrow = {
        name: tuple(size * 2 if size in (64, 128, 256, 512) else size for size in shape)
        for name, shape in shapes.items()
    }
    with pytest.raises(UnknownNetwork) as caught:
        identify_network(narrow, where="x.params")
    message = str(caught.value)
    assert "x.params holds no network of the table" in message
    assert "num_out (128, 256, 512, 1024)" in message
    assert "Nearest is resnet34, which has" in message
    with pytest.raises(UnknownNetwork, match="none of its 1 parameters .* fc1_weight"):
        identify_network({"fc1_weight": (10, 5)})


def test_units_of_unequal_sizes_are_refused():
    _, shapes = built("resnet50_w-glore_2-3", num_node=16)
    of_one = {
        name: tuple(24 if size == 16 else size for size in shape) if "conv4" in name else shape
        for name, shape in shapes.items()
    }
    with pytest.raises(UnknownNetwork, match=r"num_node \{3: 16, 4: 24\} by stage"):
        identify_network(of_one)
