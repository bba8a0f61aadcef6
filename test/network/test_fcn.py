"""Networks that segment: structure, cost, values, weights of a classification network."""

import json

import numpy as np
import pytest
from golden_weights import seeded

from checkpoint.graph import save
from checkpoint.params import CheckpointError, param_shapes
from glore_common import UsageError
from mxnet_compat import mx
from network import get_spec, get_symbol, list_networks, logits
from network.block import build_block
from network.builder import all_logits
from network.initializer import PIXEL_HEAD, initial_params
from network.pretrained import load_pretrained
from network.specs import PixelHead
from network.summary import count
from network.symbol_segmentation import pixel_head


def outputs_of(symbol, data, values):
    """Return the outputs of a graph in inference mode for named values."""
    block = mx.gluon.SymbolBlock(symbol, [mx.sym.Variable(name) for name in data])
    for name, parameter in block.collect_params().items():
        parameter.shape = values[name].shape
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(values[name]))
    found = block(*(mx.nd.array(value) for value in data.values()))
    return [array.asnumpy() for array in (found if isinstance(found, list) else [found])]


def seeded_params(symbol, shapes):
    args, auxs = param_shapes(symbol, shapes)
    return {n: seeded(n, s, gentle=False) for n, s in {**args, **auxs}.items()}


def test_head_equals_pytorch(golden):
    """Reduction, unit, classifier, up-sampling, on a map of odd size."""
    figures = golden("segmentation.npz")
    spec = get_spec("fcn_tiny_w-glore")
    spec = type(spec)(**{**spec.__dict__, "head": PixelHead(32, "glore", auxiliary=0)})
    image, maps = mx.sym.Variable("data"), mx.sym.Variable("maps")
    # The image enters as what the head up-samples to.
    joined = mx.sym.broadcast_add(maps, 0 * mx.sym.sum(image), name="joined")
    symbol = logits(pixel_head([joined], spec=spec, num_classes=5))
    data = {"data": np.zeros((2, 3, 65, 33)), "maps": figures["maps"]}
    values = seeded_params(symbol, {name: value.shape for name, value in data.items()})
    (found,) = outputs_of(symbol, data, values)
    largest = np.abs(figures["head"]).max()
    assert np.abs(found - figures["head"]).max() <= 1e-5 * largest


def test_network_equals_pytorch(golden):
    """The dilated stages and both heads."""
    figures = golden("segmentation.npz")
    symbol, _ = get_symbol("fcn_tiny_w-glore")
    symbol = mx.sym.Group(all_logits(symbol))
    values = seeded_params(symbol, {"data": (1, 3, 65, 33)})
    found = outputs_of(symbol, {"data": figures["image"]}, values)
    for name, value in zip(("logits", "aux"), found):
        assert np.abs(value - figures[name]).max() <= 1e-5 * np.abs(figures[name]).max()


@pytest.mark.parametrize("name", [*list_networks(task="segmentation"), "fcn_dpn92"])
def test_every_network_has_its_cost(name):
    counted = count(*get_symbol(name, crop_size=(64, 96)))
    assert counted.macs_of["classifier"] == 8 * 12 * get_spec(name).head.width * (
        get_spec(name).num_classes
    )
    assert counted.params > 0


def test_unit_of_the_head_has_the_published_size():
    """185,600 parameters, as in PaddleSeg: 512 channels, 128 states, 64 nodes."""
    plain, unit = (count(*get_symbol(f"fcn_resnet50{end}")).params for end in ("", "_w-glore"))
    assert unit - plain == 185_600


def test_output_stride_keeps_weights_and_reach():
    """A stage's first block has the dilation of the stage before, the others twice that."""
    for stride, dilations, size in (
        (8, ((1, 1), (1, 1), (1, 2), (2, 4)), 8),
        (16, ((1, 1), (1, 1), (1, 1), (1, 2)), 4),
        (32, ((1, 1),) * 4, 2),
    ):
        symbol, conf = get_symbol("fcn_resnet18", output_stride=stride, crop_size=64)
        assert get_spec("fcn_resnet18").with_output_stride(stride).dilations == dilations
        internals = symbol.get_internals()
        _, shapes, _ = internals["classifier_output"].infer_shape(data=(1, *conf.data_shape))
        assert shapes == [(1, 19, size, size)]
    # There and back.
    assert get_spec("fcn_resnet50").with_output_stride(32).strides == get_spec("resnet50").strides
    args, _ = param_shapes(get_symbol("fcn_dpn92")[0], {"data": (1, 3, 64, 64)})
    plain, _ = param_shapes(get_symbol("dpn92")[0], {"data": (1, 3, 64, 64)})
    assert {n for n in plain if not n.startswith("classifier")} <= set(args)
    with pytest.raises(UsageError, match="8, 16 or 32"):
        get_symbol("fcn_resnet18", output_stride=4)


@pytest.mark.parametrize("size", [(65, 33), (350, 50), (8, 8)])
def test_output_has_the_size_of_the_input(size):
    """A hybridized network with one size behind the other (FCN of gluoncv keeps the first)."""
    symbol, conf = get_symbol("fcn_tiny_w-glore", crop_size=64)
    block = build_block(symbol, conf, output="upsampled", training=False)
    for height, width in ((64, 64), size, (40, 72)):
        assert block(mx.nd.zeros((1, 3, height, width))).shape == (1, 6, height, width)


@pytest.mark.parametrize("context", ["glore", "gc", "nl", "snl", "se", "gc:ratio=1/4", "none"])
def test_context_blocks_train(context):
    symbol, conf = get_symbol("fcn_tiny", context=context, crop_size=32)
    block = build_block(symbol, conf, output=("upsampled", "aux_upsampled"))
    with mx.autograd.record():
        main, aux = block(mx.nd.random.normal(shape=(2, 3, 32, 32)))
        loss = main.square().mean() + aux.square().mean()
    loss.backward()
    kind = {"glore": "head_extra_", "none": None}.get(context, f"head_{context.split(':')[0]}_")
    own = [n for n in block.collect_params() if kind and n.startswith(kind)]
    assert bool(own) == (context != "none")
    for name, parameter in block.collect_params().items():
        if parameter.grad_req != "null":
            assert np.isfinite(parameter.grad().asnumpy()).all(), name


def test_wrong_overrides_are_refused():
    for overrides, message in (
        ({"context": "glora"}, "glore"),
        ({"context": "glore:nodes=3"}, "no setting 'nodes'"),
        ({"context": "gc:ratio=-1"}, "ratio"),
    ):
        with pytest.raises(UsageError, match=message):
            get_symbol("fcn_tiny", **overrides)
    for name, override in (("resnet18", "context"), ("resnet18", "auxiliary")):
        with pytest.raises(UsageError, match=f"{override}: {name}"):
            get_symbol(name, **{override: True})
    with pytest.raises(UsageError, match="no 2D network"):
        get_spec("fcn_RESNET50_3D")
    with pytest.raises(UsageError, match="Did you mean fcn_resnet50"):
        get_spec("fnc_resnet50")


@pytest.mark.parametrize("backbone", ["resnet18_v1", "resnet18_w-glore_1-1"])
def test_weights_of_a_classification_network_load_by_name(tmp_path, backbone):
    plain, conf = get_symbol(backbone, num_classes=19)
    shapes = {"data": (1, *conf.data_shape)}
    args, auxs = initial_params(plain, shapes, seed=3)
    path = save(str(tmp_path / "net"), 0, plain, args, auxs)
    symbol, _ = get_symbol(f"fcn_{backbone}", crop_size=64)
    inputs = {"data": (1, 3, 64, 64)}
    loaded, stats = load_pretrained(symbol, path, inputs, allow_missing=(PIXEL_HEAD,))
    assert loaded["classifier_weight"].shape == (19, 512, 1, 1)
    same = [n for n in loaded if n in args and not n.startswith("classifier")]
    assert len(same) == len(args) - 2
    assert all((loaded[name] == args[name]).all() for name in same)
    assert all((stats[name] == auxs[name]).all() for name in auxs)
    with pytest.raises(CheckpointError, match="head_reduction_conv_weight"):
        load_pretrained(symbol, path, inputs)


def test_graphs_without_dilation_are_as_before():
    for name in ("resnet50", "dpn92", "RESNET50_GLORE"):
        nodes = json.loads(get_symbol(name)[0].tojson())["nodes"]
        assert not any("dilate" in node.get("attrs", {}) for node in nodes)


def test_table_of_the_page_is_current(root):
    with open(f"{root}/docs/segmentation.md", encoding="utf-8") as stream:
        page = stream.read()
    for name in list_networks(task="segmentation"):
        counted = count(*get_symbol(name))
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.endswith(f"| {counted.params / 1e6:.2f} | {counted.macs / 1e9:.2f} |")
