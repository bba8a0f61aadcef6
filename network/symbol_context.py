"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507).

Node names follow the symbols that GloRe's author released with OctConv
(facebookresearch/OctConv): ``{name}_fc1``, ``{name}_fc2``. The SE networks released with GloRe
have not been seen; that they use the same names is an assumption.
"""

from glore_common import UsageError
from mxnet_compat import mx


def SE_Block(data, num_in, name, ndim=2, ratio=1 / 16):
    """Scale every channel by a factor computed from the averages of all channels.

    Parameters
    ----------
    data : Symbol
        (n, num_in, *spatial).
    num_in : int
        Channels of ``data``.
    name : str
        Parameters ``{name}_fc1_weight``, ``_bias``, ``{name}_fc2_weight``, ``_bias``.
    ndim : int
        Spatial rank, 1 to 3.
    ratio : float
        Width of the hidden layer as a share of ``num_in``.

    Returns
    -------
    Symbol
        (n, num_in, *spatial).

    Raises
    ------
    UsageError
        When the hidden layer would have no unit.
    """
    num_mid = int(num_in * ratio)
    if num_mid < 1:
        raise UsageError(
            f"{name}: a ratio of {ratio:g} leaves no hidden unit for {num_in} channels."
        )
    # (n, c, *spatial) -> (n, c, 1, …) -> (n, c · ratio) -> (n, c) -> (n, c, 1, …)
    out = mx.sym.Pooling(
        data=data, pool_type="avg", kernel=(1,) * ndim, global_pool=True, name=f"{name}_pool"
    )
    out = mx.sym.FullyConnected(data=out, num_hidden=num_mid, name=f"{name}_fc1")
    out = mx.sym.Activation(data=out, act_type="relu", name=f"{name}_relu")
    out = mx.sym.FullyConnected(data=out, num_hidden=num_in, name=f"{name}_fc2")
    out = mx.sym.Activation(data=out, act_type="sigmoid", name=f"{name}_sigmoid")
    out = mx.sym.Reshape(data=out, shape=(0, 0) + (1,) * ndim, name=f"{name}_expand")
    return mx.sym.broadcast_mul(data, out, name=f"{name}_mul")
