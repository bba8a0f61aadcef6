"""Convolution, batch normalisation and rectifier, alone and in the two usual orders.

The spatial rank of every builder here is the length of ``kernel``: the same function serves 1D,
2D and 3D networks. Node names are those of the MXNet checkpoints released with GloRe (Chen et
al., CVPR 2019; facebookresearch/GloRe): ``{name}_conv``, ``{name}_bn``, ``{name}_relu``.
"""

from typing import NamedTuple, Optional, Union

from mxnet_compat import mx

# A size per spatial axis; an integer is a 1D one in the notation of the released graphs.
Size = Union[int, tuple[int, ...]]


class BNConf(NamedTuple):
    """Constants of a batch normalisation.

    ``momentum`` is the share of the old running statistic that survives a step (PyTorch's
    ``momentum`` is 1 minus this).
    """

    eps: float = 1e-4
    momentum: float = 0.92


RELEASED_BN = BNConf()


def BN(data: mx.sym.Symbol, *, name: str, bn: BNConf = RELEASED_BN) -> mx.sym.Symbol:
    """Batch normalisation over all axes but 1, with a learnt scale and shift.

    Parameters
    ----------
    data
        (n, c, …).
    name
        Node ``{name}_bn``; parameters ``{name}_bn_gamma``, ``_beta``, ``_moving_mean``,
        ``_moving_var``.
    bn
        Constants.

    Returns
    -------
    Symbol
        (n, c, …).
    """
    return mx.sym.BatchNorm(
        data=data, fix_gamma=False, eps=bn.eps, momentum=bn.momentum, name=f"{name}_bn"
    )


def AC(data: mx.sym.Symbol, *, name: str, act_type: str = "relu") -> mx.sym.Symbol:
    """Activation as a node ``{name}_{act_type}``.

    ``Activation`` and not ``relu``: oneDNN folds only the former into a convolution.
    """
    return mx.sym.Activation(data=data, act_type=act_type, name=f"{name}_{act_type}")


def Conv(
    data: mx.sym.Symbol,
    *,
    num_filter: int,
    kernel: Size,
    name: str,
    pad: Optional[Size] = None,
    stride: Optional[Size] = None,
    dilate: Optional[tuple[int, ...]] = None,
    num_group: int = 1,
    no_bias: bool = True,
) -> mx.sym.Symbol:
    """Convolution as a node ``{name}_conv``.

    Parameters
    ----------
    data
        (n, c, *spatial).
    num_filter
        Number of output channels.
    kernel
        Kernel size per axis. An integer is a 1D kernel in the notation of the released graphs.
    name
        Parameters are ``{name}_conv_weight`` and, unless ``no_bias``, ``{name}_conv_bias``.
    pad, stride
        Like ``kernel``; default to 0 and 1.
    dilate
        Like ``kernel``: distance of its points; 1 by default.
    num_group
        Groups of channels.
    no_bias
        Leave out the bias.

    Returns
    -------
    Symbol
        (n, num_filter, *spatial').
    """
    default_pad: Size = 0 if isinstance(kernel, int) else (0,) * len(kernel)
    default_stride: Size = 1 if isinstance(kernel, int) else (1,) * len(kernel)
    # Left out where it says nothing: graphs without it are those of the released files.
    dilated = {} if dilate is None or set(dilate) == {1} else {"dilate": dilate}
    return mx.sym.Convolution(
        data=data,
        num_filter=num_filter,
        kernel=kernel,
        pad=default_pad if pad is None else pad,
        stride=default_stride if stride is None else stride,
        num_group=num_group,
        no_bias=no_bias,
        name=f"{name}_conv",
        **dilated,
    )


def BN_AC(data: mx.sym.Symbol, *, name: str, bn: BNConf = RELEASED_BN) -> mx.sym.Symbol:
    """Batch normalisation and rectifier: nodes ``{name}_bn`` and ``{name}_relu``."""
    return AC(BN(data, name=name, bn=bn), name=name)


def BN_AC_Conv(
    data: mx.sym.Symbol,
    *,
    num_filter: int,
    kernel: Size,
    name: str,
    pad: Optional[Size] = None,
    stride: Optional[Size] = None,
    dilate: Optional[tuple[int, ...]] = None,
    num_group: int = 1,
    bn: BNConf = RELEASED_BN,
) -> mx.sym.Symbol:
    """Pre-activation order: batch normalisation, rectifier, convolution (see :func:`Conv`)."""
    return Conv(
        BN_AC(data, name=name, bn=bn),
        num_filter=num_filter,
        kernel=kernel,
        name=name,
        pad=pad,
        stride=stride,
        dilate=dilate,
        num_group=num_group,
    )


def Conv_BN_AC(
    data: mx.sym.Symbol,
    *,
    num_filter: int,
    kernel: Size,
    name: str,
    pad: Optional[Size] = None,
    stride: Optional[Size] = None,
    dilate: Optional[tuple[int, ...]] = None,
    num_group: int = 1,
    bn: BNConf = RELEASED_BN,
) -> mx.sym.Symbol:
    """Post-activation order: convolution, batch normalisation, rectifier (see :func:`Conv`)."""
    out = Conv(
        data,
        num_filter=num_filter,
        kernel=kernel,
        name=name,
        pad=pad,
        stride=stride,
        dilate=dilate,
        num_group=num_group,
    )
    return BN_AC(out, name=name, bn=bn)
