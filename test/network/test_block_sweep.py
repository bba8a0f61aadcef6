"""Every backbone with every block: one training step on a CPU, saved, loaded strictly, equal."""

import numpy as np
import pytest

from checkpoint.graph import load, save
from mxnet_compat import mx
from network import get_symbol
from network.block import build_block
from network.symbol_context import CONTEXT_KINDS

BLOCKS = (*CONTEXT_KINDS, "glore", "gc,nl,glore")
# As small as the strides allow; dual path and 3D networks are in both lists.
QUICK = ("resnet18", "TINY_3D")
SLOW = (
    "resnet50",
    "resnet50_w-se",
    "resnext101-32x4d",
    "dpn92",
    "RESNET50_3D",
    "RESNET50_SLOWONLY",
)


def check_pair(name, block, folder):
    overrides = (
        {"clip_length": 4} if name in ("TINY_3D", "RESNET50_3D", "RESNET50_SLOWONLY") else {}
    )
    # Running statistics are those of the one step: with fresh ones several released units, whose
    # output grows with the cube of the input, leave the range of float32 one behind the other.
    overrides["bn_momentum"] = 0.0
    symbol, conf = get_symbol(name, num_classes=3, crop_size=64, block=block, **overrides)
    net = build_block(symbol, conf, seed=1)
    shape = (2, *conf.data_shape)
    data = mx.nd.array(np.random.RandomState(1).standard_normal(shape))
    before, _ = net.arg_aux_params()
    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
    with mx.autograd.record():
        loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(net(data), mx.nd.array([0, 2]))
    loss.backward()
    trainer.step(2)
    args, auxs = net.arg_aux_params()
    assert np.isfinite(loss.asnumpy()).all()
    assert all(np.isfinite(value.asnumpy()).all() for value in args.values())
    for kind in block.split(","):
        # The zero layer of a block gets the first step; what lies before it follows.
        tag = "extra" if kind == "glore" else kind
        own = [n for n in args if f"_{tag}_" in n]
        assert own
        assert any(np.abs((args[n] - before[n]).asnumpy()).max() > 0 for n in own)
    out = net(data).asnumpy()
    assert np.isfinite(out).all()
    prefix = str(folder / "net")
    save(prefix, 0, symbol, args, auxs)
    loaded = load(prefix, 0)
    again = build_block(loaded[0], conf, params=loaded[1:3], training=False)
    assert np.abs(again(data).asnumpy() - out).max() <= 1e-5 * np.abs(out).max()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", QUICK)
def test_small_backbones_with_every_block(name, block, tmp_path):
    check_pair(name, block, tmp_path)


@pytest.mark.parametrize("block", ["gc,nl"])
def test_dual_path_network_with_blocks(block, tmp_path):
    check_pair("dpn92", block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SLOW)
def test_backbones_with_every_block(name, block, tmp_path):
    check_pair(name, block, tmp_path)
