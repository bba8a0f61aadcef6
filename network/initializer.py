"""Initial values of parameters, by rules on their names, and inflation of 2D weights to 3D.

The rules are those of the Kinetics networks of GloRe (Chen et al., CVPR 2019; project
facebookresearch/GloRe): Xavier uniform weights (Glorot and Bengio, AISTATS 2010), zero biases,
BatchNorm gamma 1 and, in the BatchNorm that ends a unit, gamma 0, so that a unit starts as the
identity. Context blocks start as in GCNet (Cao et al., 2019; project xvjiarui/GCNet): the last
layer at 0, attention masks with He's normal weights (ICCV 2015), Non-local embeddings with a
standard deviation of 0.01. Inflation follows I3D (Carreira and Zisserman, CVPR 2017): a 2D kernel
repeated along time and divided by its length gives on a still clip what the 2D kernel gives on the
frame.

A rule is a pair (regular expression, function); the first one found in a parameter's name makes
its value as ``function(shape, generator)``.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from checkpoint.params import CheckpointError, compare, numpy_of, param_shapes
from checkpoint.torch_names import to_mxnet_name
from mxnet_compat import mx

from .symbol_context import CONTEXT_KINDS

LOGGER = logging.getLogger("glore")

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]
# (regular expression of names, function of shape and generator)
Rule = tuple[str, Callable[..., np.ndarray]]


def zeros(shape: Shape, generator: Optional[np.random.Generator] = None) -> np.ndarray:
    """Return zeros; ``generator`` is not used."""
    return np.zeros(shape, "float32")


def ones(shape: Shape, generator: Optional[np.random.Generator] = None) -> np.ndarray:
    """Return ones; ``generator`` is not used."""
    return np.ones(shape, "float32")


def xavier_uniform(shape: Shape, generator: np.random.Generator, gain: float = 1.0) -> np.ndarray:
    """Return a weight drawn uniformly from ±gain·sqrt(6 / (fan in + fan out)).

    Parameters
    ----------
    shape
        (outputs, inputs per group, *kernel). With groups, fan in counts the inputs of one group
        and fan out all outputs, as in the original.
    generator
    gain

    Returns
    -------
    numpy.ndarray
        float32.
    """
    if len(shape) < 2:
        raise ValueError(f"Xavier needs a weight of two dimensions or more, not of shape {shape}")
    kernel = int(np.prod(shape[2:]))
    bound = gain * np.sqrt(6.0 / ((shape[0] + shape[1]) * kernel))
    value = generator.random(shape, dtype=np.float32)
    return (value * np.float32(2 * bound) - np.float32(bound)).astype("float32")


def he_normal(shape: Shape, generator: np.random.Generator) -> np.ndarray:
    """Return a normal weight (outputs, inputs, *kernel) of variance 2 / fan in."""
    deviation = np.sqrt(2.0 / np.prod(shape[1:]))
    return (generator.standard_normal(shape) * deviation).astype("float32")


def small_normal(shape: Shape, generator: np.random.Generator) -> np.ndarray:
    """Return a normal weight of standard deviation 0.01."""
    return (generator.standard_normal(shape) * 0.01).astype("float32")


DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(^|_)blocker_bn_gamma$", zeros),
    (r"_((add|mul)(-2)?|out)_conv_weight$", zeros),
    (r"_mask_conv_weight$", he_normal),
    (r"_(theta|phi|g)_conv_weight$", small_normal),
    (r"gamma$", ones),
    (r"(beta|bias)$", zeros),
    (r"(moving|running)_mean$", zeros),
    (r"(moving|running)_var$", ones),
    (r"weight$", xavier_uniform),
)


def identity_units(symbol: mx.sym.Symbol) -> tuple[Rule, ...]:
    """Return rules that also let units without a last BatchNorm start as the identity.

    The released 2D unit ends in a convolution that Xavier would fill; these rules, put before
    ``DEFAULT_RULES``, fill it with zeros. Units that end in a BatchNorm are left alone: with both
    its gamma and the convolution at zero neither would ever get a gradient.
    """
    names = set(symbol.list_arguments())
    last = re.compile(r"(?:^|_)(fc-2|conv-tail-res|conv-tail-den)_conv_weight$")
    rules = []
    for name in symbol.list_arguments():
        match = last.search(name)
        if match and name[: match.start(1)] + "blocker_bn_gamma" not in names:
            rules.append((f"^{re.escape(name)}$", zeros))
    return tuple(rules)


def generator_for(seed: int, name: str) -> np.random.Generator:
    """Return a generator whose numbers depend on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], "<u4").tolist()])


def initial_value(
    name: str, shape: Shape, seed: int = 0, rules: Sequence[Rule] = DEFAULT_RULES
) -> np.ndarray:
    """Return the initial value of a parameter: the first rule found in its name makes it.

    Parameters
    ----------
    name
    shape
    seed
        Not negative. The value depends on seed, name, shape and rule, not on what was drawn
        before.
    rules

    Raises
    ------
    CheckpointError
        If no rule fits the name, or the rule gives another shape.
    """
    pattern, make = rule_for(name, rules)
    value = np.asarray(make(shape, generator_for(seed, name)), "float32")
    if value.shape != tuple(shape):
        raise CheckpointError(
            f"the rule {pattern!r} gives {name} the shape {value.shape}, not {shape}"
        )
    return value


def rule_for(name: str, rules: Sequence[Rule] = DEFAULT_RULES) -> Rule:
    """Return the first rule (regular expression, function) found in a parameter's name.

    Raises
    ------
    CheckpointError
        If no rule fits the name.
    """
    for pattern, make in rules:
        if re.search(pattern, name):
            return pattern, make
    raise CheckpointError(
        f"no rule says how {name} starts; add a pair (regular expression, function) for it"
    )


def initial_params(
    symbol: mx.sym.Symbol,
    input_shapes: Mapping[str, Shape],
    seed: int = 0,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> tuple[Arrays, Arrays]:
    """Return initial values of all parameters of a network.

    Parameters
    ----------
    symbol
    input_shapes
        Shape of each input with its batch axis.
    seed
    rules

    Returns
    -------
    arg_params, aux_params
        Name to float32 NumPy array.
    """
    args, auxs = (
        {name: initial_value(name, shape, seed, rules) for name, shape in shapes.items()}
        for shapes in param_shapes(symbol, input_shapes)
    )
    return args, auxs


# Parameters of GloRe units and of context blocks in the backbones, which a 2D network may lack.
UNITS = r"_extra_"
# Those of a segmentation network's heads, which a classification network has not.
PIXEL_HEAD = r"^(head|aux)_"
CONTEXTS = rf"_({'|'.join(CONTEXT_KINDS)})_"


class Inflation(NamedTuple):
    """What :func:`inflate_2d` made: arrays by name, and the names by origin."""

    arg_params: Arrays
    aux_params: Arrays
    inflated: list[str]
    copied: list[str]
    fresh: list[str]


def inflate(kernel: np.ndarray, shape: Shape) -> np.ndarray:
    """Return a 2D kernel (o, i, h, w) as a 3D one of ``shape`` (o, i, t, h, w): repeated / t."""
    return np.repeat(kernel[:, :, None] / np.float32(shape[2]), shape[2], axis=2)


def is_inflatable(given: Shape, expected: Shape) -> bool:
    """Return whether ``given`` is the shape of a 2D kernel of a 3D one of shape ``expected``."""
    return len(given) == 4 and len(expected) == 5 and tuple(given) == expected[:2] + expected[3:]


def other_classifier(
    name: str, given: Shape, expected: Shape, classifier: Union[str, Sequence[str]]
) -> bool:
    """Return whether a classifier's parameter is for other classes, or for another kind of data.

    Then the shapes differ in the number of classes only; or one classifies positions of a map,
    (classes, channels, 1, 1), and the other what is pooled, (classes, channels).
    """
    layers = (classifier,) if isinstance(classifier, str) else classifier
    if not name.startswith(tuple(f"{layer}_" for layer in layers)):
        return False
    if len(given) != len(expected):
        return {len(given), len(expected)} == {2, 4}
    return tuple(given[1:]) == tuple(expected[1:]) and given[0] != expected[0]


def inflate_2d(
    source_params: Mapping[str, Any],
    symbol: mx.sym.Symbol,
    input_shapes: Mapping[str, Shape],
    *,
    allow_missing: Sequence[str] = (UNITS, CONTEXTS),
    allow_extra: Sequence[str] = (),
    classifier: Union[str, Sequence[str]] = "classifier",
    seed: int = 0,
    rules: Sequence[Rule] = DEFAULT_RULES,
    where: str = "the 2D parameters",
) -> Inflation:
    """Make parameters of a 3D network from those of its 2D counterpart.

    Every name must be in the source, and every name of the source in the network; what may be
    missing starts fresh. A ``classifier`` of another number of classes is skipped, starts fresh,
    and is reported in the log.

    Parameters
    ----------
    source_params
        Name to array, arguments and auxiliary states together: MXNet's names, or PyTorch's (with
        dots, with or without ``module.``).
    symbol
        The 3D network.
    input_shapes
        Shape of each input with its batch axis.
    allow_missing, allow_extra
        Regular expressions of our names: what the 2D network may lack, what it may have beyond.
    classifier
        Name of the last layer.
    seed, rules
        Of the fresh values, as in :func:`initial_value`.
    where
        What messages call the source.

    Returns
    -------
    Inflation
        ``arg_params`` and ``aux_params`` (complete; name to float32 NumPy array), and the lists of
        names ``inflated``, ``copied`` and ``fresh``.

    Raises
    ------
    CheckpointError
        One error that lists everything missing, extra or of another shape.
    """
    args, auxs = param_shapes(symbol, input_shapes)
    expected = {**args, **auxs}
    source = {}
    for name, value in source_params.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = to_mxnet_name(name) if "." in name else name
        if ours in source:
            raise CheckpointError(f"the source has {ours} twice, once as {name}")
        source[ours] = numpy_of(value, name)
    values, inflated, skipped = {}, [], []
    for name, value in source.items():
        shape = expected.get(name)
        if shape is None:
            values[name] = value
        elif is_inflatable(value.shape, shape):
            values[name] = inflate(value.astype("float32"), shape)
            inflated.append(name)
        elif other_classifier(name, value.shape, shape, classifier):
            skipped.append(name)
        else:
            values[name] = value.astype("float32")
    lines = compare(
        expected, values, [*allow_missing, *(f"^{re.escape(n)}$" for n in skipped)], allow_extra
    )
    if lines:
        raise CheckpointError(f"{where} do not fit the 3D network:\n  " + "\n  ".join(lines))
    if skipped:
        LOGGER.info(
            "%s: %s have another number of classes: skipped, start afresh",
            where,
            " and ".join(skipped),
        )
    fresh = [name for name in expected if name not in values]
    for name in fresh:
        values[name] = initial_value(name, expected[name], seed, rules)
    copied = [name for name in expected if name not in inflated and name not in fresh]
    return Inflation(
        {name: values[name] for name in args},
        {name: values[name] for name in auxs},
        inflated,
        copied,
        fresh,
    )
