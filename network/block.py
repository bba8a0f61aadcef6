"""A network's Symbol as a Gluon block that trains.

``gluon.SymbolBlock`` ignores what a Symbol's variables say about their initial value and their
multipliers (https://github.com/apache/mxnet/issues/11334,
https://github.com/apache/mxnet/issues/15824). Here values and multipliers are set on the
parameters themselves, by rules on their names: a rule is a pair (regular expression, value), and
the first one found in a name applies.

The rule sets below are the Kinetics recipe of GloRe (Chen et al., CVPR 2019; project
facebookresearch/GloRe).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from checkpoint.params import CheckpointError, check, numpy_of, param_shapes
from glore_common import UsageError
from mxnet_compat import mx

from .cpu_graph import for_cpu_training
from .initializer import DEFAULT_RULES, Rule, initial_params
from .memory import MemoryGuard, check_memory

Params = Mapping[str, Any]
Multipliers = Sequence[tuple[str, float]]

# Weight decay spares what PyTorch names ``.bias``: biases, and BatchNorm's beta but not its gamma.
KINETICS_WD_MULT = ((r"_(bias|beta)$", 0.0),)
# No decay of biases nor of anything in a BatchNorm.
NO_DECAY_BN_BIAS = ((r"_(bias|beta|gamma)$", 0.0),)
# The middle convolution of each bottleneck, with its BatchNorm, learns at half the rate ...
KINETICS_LR_MULT = ((r"_conv-m2_(bn|conv)_", 0.5),)
# ... and in fine-tuning everything does but the new classifier.
FINE_TUNE_LR_MULT = ((r"^classifier_", 1.0), (r"", 0.5))


def by_rule(rules: Optional[Multipliers], name: str, default: float = 1.0) -> float:
    """Return the value of the first rule whose regular expression is found in ``name``."""
    for pattern, value in rules or ():
        if re.search(pattern, name):
            return value
    return default


def output_of(symbol: mx.sym.Symbol, output: str) -> mx.sym.Symbol:
    """Return the internal output of the node ``output`` as a Symbol.

    Raises
    ------
    UsageError
        If there is no such node; the message names the likeliest.
    """
    internals = symbol.get_internals()
    names = internals.list_outputs()
    wanted = f"{output}_output"
    if wanted not in names:
        near = [n[: -len("_output")] for n in difflib.get_close_matches(wanted, names)]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"the network has no node {output}{hint}")
    # The last of that name: what a node is called is not forced to be unique.
    return internals[len(names) - 1 - names[::-1].index(wanted)]


class SymbolNet(mx.gluon.SymbolBlock):
    """A Gluon block that computes outputs of a Symbol; made by :func:`build_block`.

    Attributes
    ----------
    symbol
        The plain network with its head: what a checkpoint stores.
    input_conf
        Its ``data_shape`` is the input's shape without the batch axis.
    arg_names, aux_names
        Names of the block's arguments and auxiliary states.
    contexts
        Where the parameters are.
    """

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        input_conf: Any,
        graph: mx.sym.Symbol,
        contexts: Iterable[mx.Context],
    ) -> None:
        name = getattr(input_conf, "name", "data")
        super().__init__(graph, mx.sym.var(name, dtype="float32"))
        self.symbol = symbol
        self.input_conf = input_conf
        self.arg_names = tuple(n for n in graph.list_arguments() if n != name)
        self.aux_names = tuple(graph.list_auxiliary_states())
        self.contexts = tuple(contexts)
        self._guard = MemoryGuard(graph)

    def forward(self, x: Any, *args: Any) -> Any:
        """Compute the output; for each new shape, check first that Non-local blocks fit.

        Raises
        ------
        MemoryProblem
            If they do not.
        """
        if isinstance(x, mx.nd.NDArray):
            self._guard(x)
        return super().forward(x, *args)

    def arg_aux_params(self) -> tuple[dict[str, mx.nd.NDArray], dict[str, mx.nd.NDArray]]:
        """Return copies of the parameters on the CPU.

        Arguments are equal on all contexts and come from the first one; auxiliary states, which
        each context gathers from its own part of the batches, are averaged.

        Returns
        -------
        arg_params, aux_params
            Name to mx.nd.NDArray on ``mx.cpu()``.
        """
        params = self.collect_params()
        args = {name: params[name].list_data()[0].copyto(mx.cpu()) for name in self.arg_names}
        auxs = {name: _mean(params[name].list_data()) for name in self.aux_names}
        return args, auxs

    def load_arg_aux(self, arg_params: Params, aux_params: Params) -> None:
        """Set all parameters, on every context.

        Parameters
        ----------
        arg_params, aux_params
            Name to NDArray or NumPy array.

        Raises
        ------
        CheckpointError
            If anything is missing, extra or of another shape; nothing is set then.
        """
        name = getattr(self.input_conf, "name", "data")
        inputs = {name: (1, *self.input_conf.data_shape)}
        check(self._cached_graph[1], arg_params, aux_params, inputs)
        self._set({**arg_params, **aux_params})

    def _set(self, values: Params) -> None:
        params = self.collect_params()
        for name, value in values.items():
            params[name].set_data(mx.nd.array(numpy_of(value, name), dtype=params[name].dtype))


def _mean(arrays: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
    """Return the mean of one array per context, on the CPU, in the arrays' type."""
    if len(arrays) == 1:
        return arrays[0].copyto(mx.cpu())
    mean = np.mean([array.asnumpy() for array in arrays], axis=0, dtype="float64")
    return mx.nd.array(mean, ctx=mx.cpu(), dtype=arrays[0].dtype)


def _contexts(ctx: Any) -> list[mx.Context]:
    """Return ctx (None, one or several contexts) as a list; each may be there once only."""
    if ctx is None:
        ctx = mx.current_context()
    contexts = [ctx] if isinstance(ctx, mx.Context) else list(ctx)
    if not contexts or any(not isinstance(c, mx.Context) for c in contexts):
        raise UsageError(f"ctx is a context or a list of contexts, not {ctx!r}")
    if len(set(contexts)) != len(contexts):
        raise UsageError(f"ctx names a device twice: {', '.join(map(str, contexts))}")
    return contexts


def build_block(
    symbol: mx.sym.Symbol,
    input_conf: Any,
    ctx: Union[None, mx.Context, Sequence[mx.Context]] = None,
    *,
    params: Union[None, Params, tuple[Params, Params]] = None,
    initializer: Optional[Sequence[Rule]] = None,
    seed: int = 0,
    lr_mult: Optional[Multipliers] = None,
    wd_mult: Optional[Multipliers] = None,
    output: Union[str, Sequence[str]] = "classifier",
    training: bool = True,
) -> SymbolNet:
    """Make a trainable Gluon block of a network.

    To train on a CPU it computes the form of the graph that a CPU can (:mod:`network.cpu_graph`).

    Parameters
    ----------
    symbol
        The plain network; its input is ``data``, unless ``input_conf`` has another ``name``.
    input_conf
        Has ``data_shape``: (3, T, H, W) or (3, H, W). Other sizes that the network takes run too.
    ctx
        Where the parameters go; the current context by default.
    params
        All parameters, by name, in one dictionary or as (arg_params, aux_params); they are
        checked strictly. Without them every value is drawn afresh.
    initializer
        Rules of :mod:`network.initializer` that go before ``DEFAULT_RULES``. Not with ``params``.
    seed
        Fresh values depend on it and on the parameter's name, not on what was drawn before.
    lr_mult, wd_mult
        Multipliers of learning rate and weight decay by rule, 1 where no rule fits:
        ``KINETICS_LR_MULT``, ``FINE_TUNE_LR_MULT``, ``KINETICS_WD_MULT``, ``NO_DECAY_BN_BIAS``.
    output
        Node whose output the block computes: by default the logits. Of several nodes it computes
        a list.
    training
        With False no parameter gets a gradient, which saves its memory.

    Returns
    -------
    SymbolNet
        Hybridized.

    Raises
    ------
    CheckpointError
        If ``params`` do not fit.
    MemoryProblem
        If Non-local blocks do not fit into memory even for one sample (:mod:`network.memory`);
        batches are checked when they come.
    UsageError
        If the network does not take ``data_shape``, or has no such output.
    """
    contexts = _contexts(ctx)
    if isinstance(output, str):
        plain = output_of(symbol, output)
    else:
        plain = mx.sym.Group([output_of(symbol, name) for name in output])
    inputs = {getattr(input_conf, "name", "data"): (1, *input_conf.data_shape)}
    check_memory(plain, inputs, training=training, ctx=contexts[0])
    args, auxs = param_shapes(plain, inputs)
    if params is None:
        rules = (*(initializer or ()), *DEFAULT_RULES)
        arg_params, aux_params = initial_params(plain, inputs, seed, rules)
    elif initializer is not None:
        raise UsageError("give the block params or an initializer, not both")
    else:
        arg_params, aux_params = _split(params, auxs)
        # What the network has beyond this output may be there, and is left out.
        beyond = set(symbol.list_arguments() + symbol.list_auxiliary_states())
        arg_params = {n: v for n, v in arg_params.items() if n in args or n not in beyond}
        aux_params = {n: v for n, v in aux_params.items() if n in auxs or n not in beyond}
        check(plain, arg_params, aux_params, inputs)

    on_cpu = any(context.device_type.startswith("cpu") for context in contexts)
    graph = for_cpu_training(plain, inputs) if training and on_cpu else plain
    block = SymbolNet(symbol, input_conf, graph, contexts)
    parameters = block.collect_params()
    for name, shape in {**args, **auxs}.items():
        parameter = parameters[name]
        parameter.shape = shape
        if name in args:
            parameter.lr_mult = by_rule(lr_mult, name)
            parameter.wd_mult = by_rule(wd_mult, name)
        if not training:
            parameter.grad_req = "null"
        # Constant, whatever the name: the values proper are set below.
        parameter.initialize(init=mx.init.Constant(0), ctx=contexts)
    block._set({**arg_params, **aux_params})
    block.hybridize()
    return block


def _split(params: Union[Params, tuple[Params, Params]], auxs: Iterable[str]) -> Any:
    """Return params (one dictionary, or two) as (arg_params, aux_params)."""
    if isinstance(params, dict):
        return (
            {name: value for name, value in params.items() if name not in auxs},
            {name: value for name, value in params.items() if name in auxs},
        )
    if len(params) != 2:
        raise CheckpointError("params is one dictionary, or a pair (arg_params, aux_params)")
    return params
