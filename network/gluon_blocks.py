"""The units and context blocks as Gluon blocks, to drop into any Gluon network.

Each wraps the graph that its builder makes (:mod:`network.symbol_glore`,
:mod:`network.symbol_context`), so function and parameters are those of the networks of the table.
They hybridize and export with the network around them, and train on CPUs and GPUs in 1D, 2D and
3D. Behind the third stage of gluoncv's ResNet-50 (its ``layer3`` is the paper's Res4)::

    net = gluoncv.model_zoo.get_model("resnet50_v1b", pretrained=True)
    net.layer3.add(GloRe(1024))
    net.layer3[-1].initialize()

Names
-----
A parameter is called ``{block.name}_{tag}``, ``{tag}`` being what follows the block's name in our
checkpoints: ``conv4_B05_gc_add-1_conv_weight`` is ``gcblock0_add-1_conv_weight`` in the first
``GCBlock`` of a process. :meth:`ContextUnit.load_unit` and :meth:`ContextUnit.unit_params`
translate. Weights of GCNet's PyTorch blocks have these shapes (but LayerNorm's, (c, 1, 1) there,
(c,) here) under other names:

========================================  ============================
GCNet                                     here
========================================  ============================
``conv_mask.{weight,bias}``               ``mask_conv_{weight,bias}``
``channel_add_conv.0.{weight,bias}``      ``add-1_conv_{weight,bias}``
``channel_add_conv.1.{weight,bias}``      ``add-ln_{gamma,beta}``
``channel_add_conv.3.{weight,bias}``      ``add-2_conv_{weight,bias}``
``{g,theta,phi}.conv.{weight,bias}``      ``{g,theta,phi}_conv_{weight,bias}``
``conv_out.conv.{weight,bias}``           ``out_conv_{weight,bias}``
========================================  ============================

(``channel_mul_conv`` likewise with ``mul``.)
"""

import functools
from collections.abc import Mapping
from typing import Any, Callable, ClassVar, Optional

from checkpoint.params import CheckpointError, compare, numpy_of, param_shapes
from glore_common import UsageError
from mxnet_compat import mx

from . import initializer
from .cpu_graph import for_cpu_training
from .memory import MemoryGuard
from .symbol_context import GC_Block, NL_Block, SE_Block, SNL_Block
from .symbol_glore import GloRe_Unit

# MXNet's own counterparts of the rules in network.initializer. What the table's networks draw by
# Xavier's rule is left to the initializer that the network around the block is given.
_INIT = {
    initializer.zeros: mx.init.Zero(),
    initializer.ones: mx.init.One(),
    initializer.he_normal: mx.init.Xavier("gaussian", "in", 2),
    initializer.small_normal: mx.init.Normal(0.01),
    initializer.xavier_uniform: None,
}
# A size per axis that every kernel and stride fits into; parameters do not depend on it.
_SIDE = 32


class ContextUnit(mx.gluon.HybridBlock):
    """A Gluon block around the graph of a unit; its subclasses say which builder makes it.

    Parameters
    ----------
    in_channels
        Channels of what it is given.
    ndim : {1, 2, 3}
        Spatial rank: it computes (n, in_channels, *spatial) -> the same.
    prefix, params
        See :class:`mxnet.gluon.Block`; ``params`` shares parameters with a block of the same
        prefix.
    **settings
        Keywords of the builder, which refuses others.
    """

    builder: ClassVar[Callable[..., mx.sym.Symbol]]

    def __init__(
        self,
        in_channels: int,
        ndim: int = 2,
        *,
        prefix: Optional[str] = None,
        params: Optional[mx.gluon.ParameterDict] = None,
        **settings: Any,
    ) -> None:
        super().__init__(prefix, params)
        if not self.prefix.endswith("_") or self.prefix == "_":
            raise UsageError(f"A unit's prefix must be a name and '_', not {self.prefix!r}.")
        # Within the name scope of a network around it, MXNet would prefix node names once more.
        with mx.name.NameManager():
            data = mx.sym.Variable("data", dtype="float32")
            symbol = type(self).builder(
                data, num_in=in_channels, name=self.prefix[:-1], ndim=ndim, **settings
            )
        inputs = {"data": (1, in_channels) + (_SIDE,) * ndim}
        args, auxs = param_shapes(symbol, inputs)
        self._shapes = {**args, **auxs}
        self._guard = MemoryGuard(symbol)
        # A Gluon block may land on a CPU, where a BatchNorm on other than 4-D data does not train.
        # This form is right on GPUs too; what it costs there has not been measured.
        graph = for_cpu_training(symbol, inputs)
        self.graph = mx.gluon.SymbolBlock(graph, data, params=params)
        for name, shape in self._shapes.items():
            parameter = self.graph.params[name]
            parameter.shape = shape
            parameter.init = _INIT[initializer.rule_for(name)[1]]

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Compute (n, in_channels, *spatial) -> the same."""
        if F is mx.nd:
            self._guard(x)
        return self.graph(x)

    def load_unit(self, params: Mapping[str, Any], name: str, ctx: Any = None) -> None:
        """Take the parameters of one unit or block of a network of the table.

        Parameters
        ----------
        params
            Name to array, arguments and auxiliary states together, of our networks or files.
        name
            The unit's name there: ``conv4_B05_extra``, ``conv3_B01_gc``.
        ctx
            Where parameters that have no place yet go.

        Raises
        ------
        CheckpointError
            If some are missing, extra or of another shape; nothing is set then.
        """
        start = f"{name}_"
        given = {
            self.prefix + key[len(start) :]: value
            for key, value in params.items()
            if key.startswith(start)
        }
        lines = compare(self._shapes, given)
        if lines:
            raise CheckpointError(
                f"the parameters {start}* do not fit {self.name}:\n  " + "\n  ".join(lines)
            )
        for key, value in given.items():
            parameter = self.graph.params[key]
            try:
                parameter.list_ctx()
            except RuntimeError:
                parameter.initialize(ctx=ctx)
            parameter.set_data(mx.nd.array(numpy_of(value, key), dtype=parameter.dtype))

    def unit_params(self, name: str) -> dict[str, mx.nd.NDArray]:
        """Return the parameters under the names that a unit ``name`` has in our networks.

        Returns
        -------
        dict
            Name to mx.nd.NDArray on the CPU, auxiliary states included.
        """
        return {
            f"{name}_{key[len(self.prefix) :]}": self.graph.params[key].data().copyto(mx.cpu())
            for key in self._shapes
        }


class GloRe(ContextUnit):
    """Global reasoning unit: see :func:`GloRe_Unit`.

    By default in the video flavour, which starts as the identity; the released flavour does not.
    """

    builder = staticmethod(functools.partial(GloRe_Unit, flavour="video"))


class GCBlock(ContextUnit):
    """Global context block: see :func:`GC_Block`."""

    builder = staticmethod(GC_Block)


class SNLBlock(ContextUnit):
    """Simplified Non-local block: see :func:`SNL_Block`."""

    builder = staticmethod(SNL_Block)


class SEBlock(ContextUnit):
    """Squeeze-and-excitation: see :func:`SE_Block`."""

    builder = staticmethod(SE_Block)


class NonLocal(ContextUnit):
    """Non-local block: see :func:`NL_Block`, also for its memory.

    Whether it fits is checked before it runs, but not within a hybridized network around it; ask
    :func:`network.memory.check_memory` there.
    """

    builder = staticmethod(NL_Block)
