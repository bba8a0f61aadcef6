"""A PyTorch reference of the segmentation networks, which makes ``golden/segmentation.npz``.

It is written from the papers and from the recipes named in docs/segmentation.md, not from this
project's builders; only the parameters' names are ours. Run it with PyTorch (2.13 made the file)::

    python test/helpers/torch_segmentation.py
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from golden_weights import GOLDEN, seeded

EPS = 1e-5


class Weights:
    """Values by our names, made when they are first asked for."""

    def __getitem__(self, key):
        name, shape = key
        return torch.from_numpy(seeded(name, shape, gentle=False)).double()


W = Weights()


def norm(x, name):
    """Batch normalisation with running statistics."""
    c = (x.shape[1],)
    return F.batch_norm(
        x,
        W[f"{name}_bn_moving_mean", c],
        W[f"{name}_bn_moving_var", c],
        W[f"{name}_bn_gamma", c],
        W[f"{name}_bn_beta", c],
        False,
        0.1,
        EPS,
    )


def conv(x, out, kernel, name, stride=1, dilation=1, bias=False):
    """Convolution that keeps the size at stride 1."""
    weight = W[f"{name}_weight", (out, x.shape[1], kernel, kernel)]
    shift = W[f"{name}_bias", (out,)] if bias else None
    return F.conv2d(x, weight, shift, stride, dilation * (kernel // 2), dilation)


def conv_bn(x, out, kernel, name, stride=1, dilation=1):
    return norm(conv(x, out, kernel, f"{name}_conv", stride, dilation), name)


def bottleneck(x, mid, out, name, stride, dilation, first):
    y = F.relu(conv_bn(x, mid, 1, f"{name}_conv-m1"))
    y = F.relu(conv_bn(y, mid, 3, f"{name}_conv-m2", stride, dilation))
    y = conv_bn(y, out, 1, f"{name}_conv-m3")
    if first:
        x = conv_bn(x, out, 1, f"{name}_conv-w1", stride)
    return F.relu(x + y)


def glore(x, states, nodes, name):
    """The unit of the PyTorch networks for Kinetics, in 2D, divided by the number of positions."""
    n, c, h, w = x.shape
    state = conv(x, states, 1, f"{name}_conv-state_conv", bias=True).reshape(n, states, -1)
    proj = conv(x, nodes, 1, f"{name}_conv-proj_conv", bias=True).reshape(n, nodes, -1)
    v = torch.einsum("nsl,ndl->nsd", state, proj) / (h * w)
    relate = W[f"{name}_GCN-G_conv_weight", (nodes, nodes, 1)]
    shift = W[f"{name}_GCN-G_conv_bias", (nodes,)]
    v = v + (torch.einsum("ed,nsd->nse", relate[:, :, 0], v) + shift)
    mix = W[f"{name}_GCN-GHW_conv_weight", (states, states, 1)]
    v = torch.einsum("ts,nsd->ntd", mix[:, :, 0], F.relu(v))
    y = torch.einsum("nsd,ndl->nsl", v, proj).reshape(n, states, h, w)
    return x + norm(conv(y, c, 1, f"{name}_fc-2_conv"), f"{name}_blocker")


def upsample(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def head(x, size, width, classes, unit=True):
    """Reduction, unit, classifier, up-sampling."""
    x = F.relu(conv_bn(x, width, 1, "head_reduction"))
    if unit:
        x = glore(x, width // 4, width // 8, "head_extra")
    return upsample(conv(x, classes, 1, "classifier", bias=True), size)


def auxiliary(x, size, width, classes):
    x = F.relu(conv_bn(x, width, 3, "aux_reduction"))
    return upsample(conv(x, classes, 1, "aux_classifier", bias=True), size)


def fcn_tiny(image):
    """Return the logits and the auxiliary logits of fcn_tiny_w-glore, output stride 8."""
    size = image.shape[2:]
    x = conv(image, 16, 7, "conv1_conv", 2)
    x = F.max_pool2d(F.relu(norm(x, "conv1")), 3, 2, 1)
    rows = ((2, 16, 32, 1, 1), (3, 16, 64, 2, 1), (4, 32, 96, 1, 1), (5, 32, 128, 1, 2))
    for stage, mid, out, stride, dilation in rows:
        before = x
        x = bottleneck(x, mid, out, f"conv{stage}_B01", stride, dilation, True)
    return head(x, size, 64, 6), auxiliary(before, size, 32, 6)


def main():
    generator = np.random.RandomState(19)
    maps = generator.standard_normal((2, 48, 9, 5)).astype("float32")
    image = generator.standard_normal((1, 3, 65, 33)).astype("float32")
    logits, aux = fcn_tiny(torch.from_numpy(image).double())
    arrays = {
        "maps": maps,
        "head": head(torch.from_numpy(maps).double(), (65, 33), 32, 5),
        "image": image,
        "logits": logits,
        "aux": aux,
    }
    path = os.path.join(GOLDEN, "segmentation.npz")
    np.savez_compressed(path, **{k: np.asarray(v, "float32") for k, v in arrays.items()})
    print(path, os.path.getsize(path), {k: v.shape for k, v in arrays.items()})


if __name__ == "__main__":
    main()
