"""Convolution, batch normalisation and rectifier, alone and in the two usual orders.

The spatial rank of every builder here is the length of ``kernel``: the same function serves 1D,
2D and 3D networks. Node names are those of the MXNet checkpoints released with GloRe (Chen et
al., CVPR 2019; facebookresearch/GloRe): ``{name}_conv``, ``{name}_bn``, ``{name}_relu``.
"""

from typing import NamedTuple

from mxnet_compat import mx


class BNConf(NamedTuple):
    """Constants of a batch normalisation.

    ``momentum`` is the share of the old running statistic that survives a step (PyTorch's
    ``momentum`` is 1 minus this).
    """

    eps: float = 1e-4
    momentum: float = 0.92


RELEASED_BN = BNConf()


def BN(data, name, bn=RELEASED_BN):
    """Batch normalisation over all axes but 1, with a learnt scale and shift.

    Parameters
    ----------
    data : Symbol
        (n, c, …).
    name : str
        Node ``{name}_bn``; parameters ``{name}_bn_gamma``, ``_beta``, ``_moving_mean``,
        ``_moving_var``.
    bn : BNConf
        Constants.

    Returns
    -------
    Symbol
        (n, c, …).
    """
    return mx.sym.BatchNorm(
        data=data, fix_gamma=False, eps=bn.eps, momentum=bn.momentum, name=f"{name}_bn"
    )


def AC(data, name, act_type="relu"):
    """Activation as a node ``{name}_{act_type}``.

    ``Activation`` and not ``relu``: oneDNN folds only the former into a convolution.
    """
    return mx.sym.Activation(data=data, act_type=act_type, name=f"{name}_{act_type}")


def Conv(data, num_filter, kernel, name, pad=None, stride=None, num_group=1, no_bias=True):
    """Convolution as a node ``{name}_conv``.

    Parameters
    ----------
    data : Symbol
        (n, c, *spatial).
    num_filter : int
        Number of output channels.
    kernel : tuple of int, or int
        Kernel size per axis. An integer is a 1D kernel in the notation of the released graphs.
    name : str
        Parameters are ``{name}_conv_weight`` and, unless ``no_bias``, ``{name}_conv_bias``.
    pad, stride : like ``kernel``, optional
        Default to 0 and 1.
    num_group : int
        Groups of channels.
    no_bias : bool
        Leave out the bias.

    Returns
    -------
    Symbol
        (n, num_filter, *spatial').
    """
    if isinstance(kernel, int):
        default_pad, default_stride = 0, 1
    else:
        default_pad, default_stride = (0,) * len(kernel), (1,) * len(kernel)
    return mx.sym.Convolution(
        data=data,
        num_filter=num_filter,
        kernel=kernel,
        pad=default_pad if pad is None else pad,
        stride=default_stride if stride is None else stride,
        num_group=num_group,
        no_bias=no_bias,
        name=f"{name}_conv",
    )


def BN_AC(data, name, bn=RELEASED_BN):
    """Batch normalisation and rectifier: nodes ``{name}_bn`` and ``{name}_relu``."""
    return AC(BN(data, name, bn), name)


def BN_AC_Conv(
    data,
    num_filter,
    kernel,
    name,
    pad=None,
    stride=None,
    num_group=1,
    no_bias=True,
    bn=RELEASED_BN,
):
    """Pre-activation order: batch normalisation, rectifier, convolution (see :func:`Conv`)."""
    return Conv(BN_AC(data, name, bn), num_filter, kernel, name, pad, stride, num_group, no_bias)


def Conv_BN_AC(
    data,
    num_filter,
    kernel,
    name,
    pad=None,
    stride=None,
    num_group=1,
    no_bias=True,
    bn=RELEASED_BN,
):
    """Post-activation order: convolution, batch normalisation, rectifier (see :func:`Conv`)."""
    return BN_AC(Conv(data, num_filter, kernel, name, pad, stride, num_group, no_bias), name, bn)
