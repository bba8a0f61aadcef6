"""Names and shapes of a network's parameters, and what they are called in PyTorch files.

The names are those of the released MXNet checkpoints. The PyTorch names are those of the Kinetics
weights of GloRe (Chen et al., CVPR 2019; project facebookresearch/GloRe).
"""

import re
from collections.abc import Mapping

import numpy as np

from glore_common import GloReError, UsageError
from mxnet_compat import mx

# An error lists this many names of a kind and counts the others.
LISTED = 40


class CheckpointError(GloReError):
    """Parameters that cannot be read, or do not fit the network; the message lists all of it."""


def is_label(name):
    """Return whether an argument is a label (``softmax_label``): data, not a parameter."""
    return name.endswith("label")


def infer_shapes(
    symbol: mx.sym.Symbol, input_shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and shape of every variable and output of a graph, in graph order.

    Parameters
    ----------
    symbol
        Any graph. Nodes may share a name.
    input_shapes
        Shape of each input with its batch axis.

    Returns
    -------
    list of (name, shape)
        A shape that does not follow from the inputs' is (), or has zeros.

    Raises
    ------
    UsageError
        If the graph does not take inputs of these names or shapes.
    """
    unknown = sorted(set(input_shapes) - set(symbol.list_arguments()))
    if unknown:
        raise UsageError(f"the network has no input {', '.join(unknown)}")
    internals = symbol.get_internals()
    try:
        _, shapes, _ = internals.infer_shape_partial(**input_shapes)
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"the network does not take inputs of shapes {dict(input_shapes)}: {reason}"
        ) from error
    names = internals.list_outputs()
    return [(n, tuple(shape or ())) for n, shape in zip(names, shapes or [()] * len(names))]


def param_shapes(
    symbol: mx.sym.Symbol, input_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of a network's parameters.

    Parameters
    ----------
    symbol
    input_shapes
        Shape of each input with its batch axis: ``{"data": (1, 3, 8, 224, 224)}``. Labels need
        none.

    Returns
    -------
    args, auxs
        Name to shape, in the symbol's order, without inputs and labels.

    Raises
    ------
    UsageError
        If the network does not take inputs of these shapes.
    """
    found = dict(infer_shapes(symbol, input_shapes))
    args = {
        name: found[name]
        for name in symbol.list_arguments()
        if name not in input_shapes and not is_label(name)
    }
    auxs = {name: found[name] for name in symbol.list_auxiliary_states()}
    for name, shape in [*args.items(), *auxs.items()]:
        if not shape or 0 in shape:
            raise UsageError(
                f"the shape of {name} does not follow from {dict(input_shapes)}; give the shape of "
                "every input of the network"
            )
    return args, auxs


def listing(names):
    """Join names for a message; beyond a few dozen the others are counted."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def any_matches(patterns, name):
    """Return whether one of the regular expressions is found in ``name``."""
    return any(re.search(pattern, name) for pattern in patterns)


def compare(expected, given, allow_missing=(), allow_extra=()):
    """Return one line for each kind of difference between wanted and given parameters.

    Parameters
    ----------
    expected : dict
        Name to shape; a shape of None is not compared.
    given : dict
        Name to array.
    allow_missing, allow_extra : sequence of str
        Regular expressions of names that may be missing, or be there in excess.
    """
    lines = []
    missing = [n for n in expected if n not in given and not any_matches(allow_missing, n)]
    extra = [n for n in given if n not in expected and not any_matches(allow_extra, n)]
    wrong = [
        f"{name} is {tuple(given[name].shape)}, the network has {shape}"
        for name, shape in expected.items()
        if shape is not None and name in given and tuple(given[name].shape) != shape
    ]
    for kind, found in [("missing", missing), ("extra", extra), ("of another shape", wrong)]:
        if found:
            lines.append(f"{kind} ({len(found)}): {listing(found)}")
    return lines


def check(
    symbol,
    arg_params,
    aux_params,
    input_shapes,
    allow_missing=(),
    allow_extra=(),
    where="the parameters",
):
    """Raise one error that lists everything in which parameters do not fit a network.

    Parameters
    ----------
    symbol : mx.sym.Symbol
    arg_params, aux_params : dict
        Name to array (anything with a ``shape``).
    input_shapes : dict or None
        Shapes of the inputs with the batch axis; None compares names only.
    allow_missing, allow_extra : sequence of str
        Regular expressions of names that may be missing or be there in excess.
    where : str
        What the message calls the parameters, such as the file that they come from.

    Raises
    ------
    CheckpointError
    """
    if input_shapes is None:
        args = {n: None for n in symbol.list_arguments() if n != "data" and not is_label(n)}
        auxs = dict.fromkeys(symbol.list_auxiliary_states())
    else:
        args, auxs = param_shapes(symbol, input_shapes)
    lines = [
        f"{kind}, {line}"
        for kind, expected, given in [
            ("arguments", args, arg_params),
            ("auxiliary states", auxs, aux_params),
        ]
        for line in compare(expected, given, allow_missing, allow_extra)
    ]
    if lines:
        raise CheckpointError(f"{where} do not fit the network:\n  " + "\n  ".join(lines))


def numpy_of(value, name):
    """Return a parameter (NumPy array, NDArray or PyTorch tensor) as a NumPy array."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, mx.nd.NDArray):
        return value.asnumpy()
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    raise CheckpointError(f"{name} is no array but a {type(value).__name__}")


# PyTorch's module path beside ours, within a GloRe unit and within the bottlenecks. The first
# pair whose left side is found is used; a module that is in no pair keeps its name.
MODULES = (
    ("conv_state", "conv-state_conv"),
    ("conv_proj", "conv-proj_conv"),
    ("gcn.conv1", "GCN-G_conv"),
    ("gcn.conv2", "GCN-GHW_conv"),
    ("conv_extend", "fc-2_conv"),
    ("blocker", "blocker_bn"),
)
BATCH_NORM = (
    ("weight", "gamma"),
    ("bias", "beta"),
    ("running_mean", "moving_mean"),
    ("running_var", "moving_var"),
)
_BRANCH_OF_TORCH = re.compile(r"^conv_(\w\d)$")
_BRANCH_OF_OURS = re.compile(r"^conv-(\w\d)$")


def strip_module(name):
    """Return a PyTorch name without the ``module.`` that DataParallel puts before it."""
    while name.startswith("module."):
        name = name[len("module.") :]
    return name


def to_mxnet_name(torch_name):
    """Return our name of a PyTorch parameter.

    ``module.conv3.B01.conv_m1.bn.weight`` is ``conv3_B01_conv-m1_bn_gamma``;
    ``conv3.B01_extra.gcn.conv2.weight`` is ``conv3_B01_extra_GCN-GHW_conv_weight``. A name that is
    none of GloRe's is translated by the same rule: it then shows up as extra in :func:`check`.
    :func:`to_torch_name` is the reverse.
    """
    path, _, leaf = strip_module(torch_name).rpartition(".")
    for theirs, ours in MODULES:
        if path == theirs or path.endswith("." + theirs):
            path = path[: len(path) - len(theirs)] + ours
            break
    modules = [_BRANCH_OF_TORCH.sub(r"conv-\1", module) for module in path.split(".")]
    # Batch and layer normalisations: gamma and beta are weight and bias there.
    if re.search(r"(^|[_-])(bn|ln)$", modules[-1]):
        leaf = dict(BATCH_NORM).get(leaf, leaf)
    return "_".join([*modules, leaf]) if path else leaf


def to_torch_name(name):
    """Return the PyTorch name (without ``module.``) of one of our parameters.

    The reverse of :func:`to_mxnet_name` for every name of the Kinetics networks.

    Raises
    ------
    CheckpointError
        If the name is no parameter name: it ends in none of weight, bias, gamma, beta,
        moving_mean, moving_var.
    """
    match = re.match(r"^(?:(.+)_)?(weight|bias|gamma|beta|moving_mean|moving_var)$", name)
    if match is None:
        raise CheckpointError(f"{name} is no parameter name; PyTorch's name of it is not known")
    path = match[1] or ""
    leaf = {ours: theirs for theirs, ours in BATCH_NORM}.get(match[2], match[2])
    ending = ""
    for theirs, ours in MODULES:
        if path == ours or path.endswith("_" + ours):
            path, ending = path[: len(path) - len(ours)].rstrip("_"), theirs
            break
    modules = []
    for part in path.split("_") if path else []:
        if part == "extra" and modules:
            modules[-1] += "_extra"
        else:
            modules.append(_BRANCH_OF_OURS.sub(r"conv_\1", part))
    return ".".join([*modules, *([ending] if ending else []), leaf])


def to_torch_names(names):
    """Return {our name: PyTorch name} for a Symbol's parameters, or for an iterable of names.

    Raises
    ------
    CheckpointError
        If two names would be one in PyTorch, or one is no parameter name.
    """
    if isinstance(names, mx.sym.Symbol):
        arguments = [n for n in names.list_arguments() if n != "data" and not is_label(n)]
        names = arguments + names.list_auxiliary_states()
    found = {name: to_torch_name(name) for name in names}
    if len(set(found.values())) != len(found):
        raise CheckpointError("two of these parameters have the same PyTorch name")
    return found
