"""The units as Gluon blocks: function, parameters, training, export, in other networks."""

import numpy as np
import pytest
from golden_weights import seeded
from test_context_blocks import golden_values, noise
from test_glore_unit import SHAPES as UNIT_SHAPES
from test_glore_unit import VIDEO_NAMES, evaluate, relative

from checkpoint.params import CheckpointError
from glore_common import UsageError
from mxnet_compat import mx
from network import (
    GC_Block,
    GCBlock,
    GloRe,
    GloRe_Unit,
    NL_Block,
    NonLocal,
    SE_Block,
    SEBlock,
    SNL_Block,
    SNLBlock,
    get_symbol,
    memory,
)
from network.initializer import initial_params
from network.memory import MemoryProblem

DATA = mx.sym.Variable("data")
# What makes the block, and the same as a graph called "u".
PAIRS = {
    "glore": (
        GloRe,
        lambda ndim: GloRe_Unit(DATA, num_in=32, name="u", ndim=ndim, flavour="video"),
    ),
    "gc": (GCBlock, lambda ndim: GC_Block(DATA, num_in=32, name="u", ndim=ndim)),
    "snl": (SNLBlock, lambda ndim: SNL_Block(DATA, num_in=32, name="u", ndim=ndim)),
    "se": (SEBlock, lambda ndim: SE_Block(DATA, num_in=32, name="u", ndim=ndim)),
    "nl": (NonLocal, lambda ndim: NL_Block(DATA, num_in=32, name="u", ndim=ndim)),
}
CASES = pytest.mark.parametrize(("kind", "ndim"), [(k, n) for k in PAIRS for n in (1, 2, 3)])


def input_of(ndim, seed=0):
    return noise((2, 32) + (6,) * ndim, seed)


def random_params(symbol, shape):
    """Return values for all parameters, none of them zero."""
    args, auxs = initial_params(symbol, {"data": shape})
    return {n: seeded(n, v.shape, 3, False) for n, v in {**args, **auxs}.items()}


@CASES
def test_block_is_the_graph_with_the_same_parameters(kind, ndim):
    make, graph = PAIRS[kind]
    data, symbol = input_of(ndim), graph(ndim)
    values = random_params(symbol, data.shape)
    block = make(32, ndim=ndim)
    block.load_unit({**values, "other_weight": np.zeros(3)}, "u")
    (expected,) = evaluate(symbol, values, {"data": data})
    assert relative(block(mx.nd.array(data)).asnumpy(), expected) < 1e-6
    block.hybridize()
    assert relative(block(mx.nd.array(data)).asnumpy(), expected) < 1e-6
    back = block.unit_params("u")
    assert {n: v.asnumpy().tolist() for n, v in back.items()} == {
        n: v.tolist() for n, v in values.items()
    }
    start = f"{block.name}_"
    assert all(name.startswith(start) for name in block.collect_params())


@CASES
def test_block_starts_by_its_own_rules_and_trains(kind, ndim):
    block = PAIRS[kind][0](32, ndim=ndim)
    # The network's initializer must not spoil what starts at zero.
    block.initialize(mx.init.Xavier())
    block.hybridize()
    data = mx.nd.array(input_of(ndim))
    if kind != "se":
        assert np.array_equal(block(data).asnumpy(), data.asnumpy())
    goal = mx.nd.array(input_of(ndim, 1))
    trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.05})
    losses = []
    for _ in range(4):
        with mx.autograd.record():
            loss = ((block(data) - goal) ** 2).mean()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asscalar()))
    assert losses[0] > losses[1] > losses[2] > losses[3]


@CASES
def test_network_around_it_hybridizes_saves_and_exports(kind, ndim, tmp_path):
    make = PAIRS[kind][0]

    def network():
        net = mx.gluon.nn.HybridSequential()
        with net.name_scope():
            conv = {1: mx.gluon.nn.Conv1D, 2: mx.gluon.nn.Conv2D, 3: mx.gluon.nn.Conv3D}[ndim]
            net.add(conv(32, 1), make(32, ndim=ndim), make(32, ndim=ndim))
        return net

    net, data = network(), mx.nd.array(input_of(ndim))
    net.initialize(mx.init.Normal(0.1))
    for parameter in net[1].collect_params().values():
        if parameter.grad_req != "null":
            parameter.set_data(mx.nd.random.normal(shape=parameter.shape))
    plain = net(data).asnumpy()
    net.hybridize()
    assert relative(net(data).asnumpy(), plain) < 1e-6
    net.export(str(tmp_path / "net"))
    loaded = mx.gluon.SymbolBlock.imports(
        str(tmp_path / "net-symbol.json"), "data", str(tmp_path / "net-0000.params")
    )
    assert relative(loaded(data).asnumpy(), plain) < 1e-6
    net.save_parameters(str(tmp_path / "net.params"))
    other = network()
    other.load_parameters(str(tmp_path / "net.params"))
    assert relative(other(data).asnumpy(), plain) < 1e-6


def test_glore_block_gives_the_golden_output(golden):
    block = GloRe(32, num_node=16, num_state=32)
    shapes = {n: v.shape for n, v in block.collect_params().items()}
    names = {n: VIDEO_NAMES["unit" + n[len(block.name) :]] for n in shapes}
    values = {n: seeded(names[n], shapes[n], 0, False) for n in shapes}
    block.load_unit(values, block.name)
    data = mx.nd.array(noise(UNIT_SHAPES[2], 200))
    assert (
        relative(block(data).asnumpy(), golden("torch_open.npz")["GloRe_Unit_2D_norm0/out"]) < 1e-5
    )


def test_gc_block_gives_the_golden_output(golden):
    symbol = GC_Block(DATA, num_in=32, name="block", ratio=0.25)
    block = GCBlock(32, ratio=0.25)
    block.load_unit(golden_values(symbol), "block")
    data = mx.nd.array(noise((2, 32, 7, 9), 400))
    assert relative(block(data).asnumpy(), golden("gcnet_open.npz")["gc_att_add/out"]) < 1e-5


def test_unit_of_a_network_moves_into_a_block_and_back():
    symbol, conf = get_symbol("TINY_GLORE", block="gc")
    args, auxs = initial_params(symbol, {"data": (1, *conf.data_shape)}, seed=4)
    params = {**args, **auxs}
    for name, block in (
        ("conv3_B01_extra", GloRe(96, ndim=3)),
        ("conv4_B01_gc", GCBlock(128, ndim=3)),
    ):
        block.load_unit(params, name)
        back = block.unit_params(name)
        assert set(back) == {n for n in params if n.startswith(f"{name}_")}
        assert all(np.array_equal(value.asnumpy(), params[n]) for n, value in back.items())


def test_what_does_not_fit_is_listed_and_nothing_is_set():
    block = GCBlock(32)
    block.initialize()
    params = block.unit_params("u")
    before = {n: v.asnumpy() for n, v in params.items()}
    del params["u_mask_conv_bias"]
    params["u_stray"] = mx.nd.zeros(3)
    params["u_add-1_conv_weight"] = mx.nd.zeros((3, 32, 1, 1))
    with pytest.raises(CheckpointError) as caught:
        block.load_unit(params, "u")
    message = str(caught.value)
    assert f"missing (1): {block.name}_mask_conv_bias" in message
    assert f"extra (1): {block.name}_stray" in message
    assert "add-1_conv_weight is (3, 32, 1, 1), the network has (2, 32, 1, 1)" in message
    assert all(np.array_equal(v.asnumpy(), before[n]) for n, v in block.unit_params("u").items())


def test_keywords_that_the_builder_has_not_are_refused():
    for make in (block for block, _ in PAIRS.values()):
        with pytest.raises(TypeError, match="'rato'"):
            make(32, rato=1 / 4)


def test_prefixes_are_checked():
    assert GCBlock(32, prefix="mine_").name == "mine"
    with pytest.raises(UsageError, match="a name and '_'"):
        GCBlock(32, prefix="mine")


def test_blocks_share_parameters():
    one = GCBlock(32, prefix="shared_")
    two = GCBlock(32, prefix="shared_", params=one.collect_params())
    one.initialize()
    name = "shared_mask_conv_weight"
    assert two.collect_params()[name] is one.collect_params()[name]
    data = mx.nd.array(input_of(2))
    assert np.array_equal(one(data).asnumpy(), two(data).asnumpy())


def test_non_local_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda ctx=None: 10_000)
    block = NonLocal(4)
    block.initialize()
    block(mx.nd.zeros((1, 4, 6, 8))).wait_to_read()
    with pytest.raises(MemoryProblem, match="compares 64 with 64 positions"):
        block(mx.nd.zeros((1, 4, 8, 8)))


def test_readme_example_for_gluoncv():
    import gluoncv

    net = gluoncv.model_zoo.get_model("resnet18_v1b", classes=5)
    net.initialize()
    data = mx.nd.array(noise((2, 3, 64, 64), 9))
    before = net(data).asnumpy()
    net.layer3.add(GloRe(256))
    net.layer3[-1].initialize()
    assert np.array_equal(net(data).asnumpy(), before)
    net.hybridize()
    assert relative(net(data).asnumpy(), before) < 1e-5
    with mx.autograd.record():
        loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(net(data), mx.nd.array([0, 1]))
    loss.backward()
    gamma = net.layer3[-1].collect_params(".*blocker_bn_gamma")
    assert all(np.abs(p.grad().asnumpy()).max() > 0 for p in gamma.values())
