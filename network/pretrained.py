"""Weights from other files for a network: PyTorch's, gluoncv's, or of a 2D network.

The released Kinetics weights of GloRe (Chen et al., CVPR 2019; project facebookresearch/GloRe) are
PyTorch files, which :func:`load_pretrained` takes and the command ``python -m network.pretrained
convert`` turns into MXNet files.

A file that does not fit a network is one error that lists all that is missing, extra or of
another shape.
"""

import argparse
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from checkpoint.gluoncv_names import (
    convolutions_of_blocks,
    from_gluoncv,
    is_gluoncv,
    our_name,
)
from checkpoint.graph import load, normalisations, read_symbol, save
from checkpoint.params import (
    STREAM_START,
    ZIP_START,
    Arrays,
    CheckpointError,
    check,
    check_finite,
    listing,
    numpy_of,
    param_shapes,
    read_params,
    split,
)
from checkpoint.paths import Files, find, split_key, stem_of
from checkpoint.safetensors_file import is_safetensors, read_safetensors
from checkpoint.torch_file import read_torch_file, read_with_torch
from checkpoint.torch_names import strip_module, to_mxnet_name
from glore_common import module_command, run_main
from mxnet_compat import mx

from .builder import get_symbol
from .initializer import (
    CONTEXTS,
    DEFAULT_RULES,
    UNITS,
    inflate_2d,
    initial_value,
    is_inflatable,
    other_classifier,
)

# What auxiliary states' names end in.
STATES = ("moving_mean", "moving_var")
LOGGER = logging.getLogger("glore")


def _standalone_prefix(names: Sequence[str], symbol_names: Sequence[str]) -> str:
    """Return what stands before a unit's names in a symbol, when the unit is there alone."""
    known = set(symbol_names)
    if not names or any(name in known for name in names):
        return ""
    first = min(names)
    ends = [name[: -len(first)] for name in symbol_names if name.endswith("_" + first)]
    return ends[0] if len(ends) == 1 else ""


def _with_kinds(params: Mapping[str, Any]) -> Arrays:
    """Put ``arg:`` or ``aux:`` before names that have neither, as their endings tell."""
    return {
        name
        if name.startswith(("arg:", "aux:"))
        else f"{'aux' if name.endswith(STATES) else 'arg'}:{name}": value
        for name, value in params.items()
    }


def _our_names(state_dict: Mapping[str, Any], symbol: Optional[mx.sym.Symbol]) -> Arrays:
    """Return {our name: NumPy array} of a PyTorch state dict; see :func:`read_source`."""
    found: Arrays = {}
    short = {name: strip_module(name) for name in state_dict}
    # torchvision's and timm's ResNets have the layout of gluoncv's, and nearly its names.
    foreign = any(is_gluoncv(name) for name in short.values())
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = (foreign and our_name(short[name])) or to_mxnet_name(name)
        if ours in found:
            raise CheckpointError(f"the state dict has {ours} twice, once as {name}")
        found[ours] = numpy_of(value, name)
    if symbol is None:
        return _with_kinds(found)
    known = symbol.list_arguments() + symbol.list_auxiliary_states()
    prefix = _standalone_prefix(list(found), known)
    return {prefix + name: value for name, value in found.items()}


def from_torch(
    state_dict: Mapping[str, Any], symbol: mx.sym.Symbol, input_shapes: Optional[Mapping] = None
) -> tuple[Arrays, Arrays]:
    """Make a network's parameters of a PyTorch state dict, strictly.

    Parameters
    ----------
    state_dict
        PyTorch's names, with or without ``module.``, to NumPy arrays or tensors. The names of a
        whole network, or of a GloRe unit alone (``conv_state.weight``, ...) for a symbol that is
        one unit of any name. Entries ``num_batches_tracked`` are left out.
    symbol
        The network.
    input_shapes
        Shape of each input with its batch axis; without it only names are compared.

    Returns
    -------
    arg_params, aux_params
        Name to float32 NumPy array.

    Raises
    ------
    CheckpointError
        One error that lists everything missing, extra or of another shape.
    """
    arg_params, aux_params = split(_our_names(state_dict, symbol), "the state dict", symbol)
    check(symbol, arg_params, aux_params, input_shapes, where="the state dict's parameters")
    return _float32(arg_params), _float32(aux_params)


def _float32(params: Mapping[str, Any]) -> Arrays:
    return {name: numpy_of(value, name).astype("float32") for name, value in params.items()}


def read_source(
    source: str, symbol: Optional[mx.sym.Symbol], epoch: Optional[int] = None
) -> tuple[Arrays, Arrays, str]:
    """Read pretrained parameters of either kind, which is told by the content.

    Parameters
    ----------
    source
        An MXNet prefix or ``.params`` file, a PyTorch file (``FILE:KEY``: what lies under this key
        of it), or a ``.safetensors`` file with PyTorch's names. ResNets of gluoncv, torchvision and
        timm too, see :mod:`checkpoint.gluoncv_names`.
    symbol
        Tells arguments from auxiliary states where the file does not; without it the names do.
    epoch
        Of a prefix; the newest by default.

    Returns
    -------
    arg_params, aux_params
        Our names to NumPy arrays, not yet compared with ``symbol``.
    path
        The file that was read.
    """
    source = os.fspath(source)
    path = split_key(source)[0]
    path = path if os.path.isfile(path) else find(source, epoch).params
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(STREAM_START))
        as_safetensors = is_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if as_safetensors:
        return (*split(_our_names(read_safetensors(path)[0], symbol), path, symbol), path)
    if start.startswith(ZIP_START) or start == STREAM_START:
        return (*split(_our_names(read_torch_file(source), symbol), path, symbol), path)
    params = from_gluoncv(_as_its_graph_reads(read_params(path), path, symbol))
    return (*split(_with_kinds(params) if symbol is None else params, path, symbol), path)


def _as_its_graph_reads(params: Arrays, path: str, symbol: Optional[mx.sym.Symbol]) -> Arrays:
    """Return a file's parameters such that ``symbol`` does with them what their own graph does.

    Their own is the graph beside the file, if there is one. Where it says ``fix_gamma``, gammas
    count as 1 whatever the file has. Another ``eps`` than ours becomes a part of the running
    variance: ``var + eps`` is what counts when statistics are not those of a batch.

    Raises
    ------
    CheckpointError
        If such a variance would be negative.
    """
    beside = Files(stem_of(path)).symbol
    if not os.path.exists(beside):
        return params
    try:
        theirs = normalisations(read_symbol(beside))
    except CheckpointError as error:
        LOGGER.warning("%s: its own graph is not compared with ours: %s", path, error)
        return params
    params = dict(params)
    key = {name.removeprefix("arg:").removeprefix("aux:"): name for name in params}
    fixed = [gamma for gamma, norm in theirs.items() if norm.fix_gamma and gamma in key]
    changed = [gamma for gamma in fixed if (params[key[gamma]] != 1).any()]
    for gamma in changed:
        params[key[gamma]] = np.ones_like(params[key[gamma]])
    if changed:
        LOGGER.info(
            "%s: %d gammas count as 1, as its own graph has them (fix_gamma): %s",
            path,
            len(changed),
            listing(changed),
        )
    foreign = any(map(is_gluoncv, params))
    per_block = convolutions_of_blocks(params) if foreign else 0
    ours = {} if symbol is None else normalisations(symbol)
    moved: list[str] = []
    negative: list[str] = []
    for gamma, norm in theirs.items():
        own = ours.get((foreign and our_name(gamma, per_block)) or gamma)
        if own is None or norm.var not in key or math.isclose(own.eps, norm.eps, rel_tol=1e-5):
            continue
        var = params[key[norm.var]].astype("float32") + np.float32(norm.eps - own.eps)
        params[key[norm.var]] = var
        (negative if (var < 0).any() else moved).append(f"{gamma} ({norm.eps:g}, ours {own.eps:g})")
    if negative:
        raise CheckpointError(
            f"{path}: eps of its own graph is smaller than ours, and some variances are too small "
            f"to make up for that: {listing(negative)}. Use it with its own graph, without "
            "--network"
        )
    if moved:
        LOGGER.info("%s: another eps, which the variances take up: %s", path, listing(moved))
    return params


def load_pretrained(
    symbol: mx.sym.Symbol,
    source: str,
    input_shapes: Mapping,
    epoch: Optional[int] = None,
    classifier: Union[str, Sequence[str]] = "classifier",
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    seed: int = 0,
    rules: Sequence = DEFAULT_RULES,
    classes: Optional[tuple[Sequence[str], Sequence[str]]] = None,
) -> tuple[Arrays, Arrays]:
    """Load pretrained parameters for a network, whatever kind of file they are in.

    A classifier with other classes starts afresh, which the log says, but for the rows of classes
    of the same name where ``classes`` tells these. What
    ``allow_missing`` lets be missing starts afresh too. All else must fit. 2D weights are inflated
    for a 3D network (:func:`network.initializer.inflate_2d`), whose units may then be new.

    Parameters
    ----------
    symbol
        The network.
    source
        An MXNet prefix or ``.params`` file, or a PyTorch file.
    input_shapes
        Shape of each input with its batch axis: ``{"data": (1, 3, 8, 224, 224)}``.
    epoch
        Of a prefix; the newest by default.
    classifier
        Name of the last layer, or names where several depend on the classes.
    allow_missing, allow_extra
        Regular expressions of names that may be missing, or be there in excess (left out).
    seed, rules
        Of fresh values, as in :func:`network.initializer.initial_value`.
    classes
        Names of the file's classes and of the network's. (A 2D file's classifier has none of the
        latter.)

    Returns
    -------
    arg_params, aux_params
        All parameters of the network: name to float32 NumPy array.

    Raises
    ------
    CheckpointError
        One error that lists everything missing, extra or of another shape.
    """
    args, auxs = param_shapes(symbol, input_shapes)
    arg_params, aux_params, path = read_source(source, symbol, epoch)
    check_finite({**arg_params, **aux_params}, path)
    if any(n in args and is_inflatable(v.shape, args[n]) for n, v in arg_params.items()):
        made = inflate_2d(
            {**arg_params, **aux_params},
            symbol,
            input_shapes,
            allow_missing=(*allow_missing, UNITS, CONTEXTS),
            allow_extra=allow_extra,
            classifier=classifier,
            seed=seed,
            rules=rules,
            where=path,
        )
        LOGGER.info(
            "%s holds 2D weights: %d kernels inflated, %d parameters copied, %d start afresh: %s",
            path,
            len(made.inflated),
            len(made.copied),
            len(made.fresh),
            listing(made.fresh),
        )
        return made.arg_params, made.aux_params
    other = classes is not None and [*map(plain, classes[0])] != [*map(plain, classes[1])]
    replaced = [
        name
        for name, value in arg_params.items()
        if name in args
        and (
            other_classifier(name, value.shape, args[name], classifier)
            or (other and name.startswith("classifier_"))
        )
    ]
    before = {name: arg_params[name] for name in replaced}
    if replaced and not isinstance(classifier, str):
        LOGGER.info(
            "%s is of other classes than the network: %s start afresh", path, listing(replaced)
        )
    elif replaced:
        first = replaced[0]
        LOGGER.info(
            "%s: the classifier has %d classes, the network %d%s: %s start afresh",
            path,
            arg_params[first].shape[0],
            args[first][0],
            " others" if len(arg_params[first]) == args[first][0] else "",
            " and ".join(replaced),
        )
    for name in replaced:
        del arg_params[name]
    allowed = [*allow_missing, *(f"^{re.escape(name)}$" for name in replaced)]
    check(symbol, arg_params, aux_params, input_shapes, allowed, allow_extra, where=path)
    missing = [n for n in [*args, *auxs] if n not in arg_params and n not in aux_params]
    others = [name for name in missing if name not in replaced]
    if others:
        LOGGER.info("%s: not in the file, start afresh: %s", path, listing(others))

    def complete(shapes, params):
        return {
            name: params[name].astype("float32")
            if name in params
            else initial_value(name, shape, seed, rules)
            for name, shape in shapes.items()
        }

    arg_params = complete(args, arg_params)
    if classes is not None:
        _keep_rows(arg_params, before, classes, path)
    return arg_params, complete(auxs, aux_params)


def plain(name: str) -> str:
    """Return a class name as it is compared with others: case, spaces and underscores alike."""
    return re.sub(r"[\s_]+", " ", name.strip()).casefold()


def _keep_rows(
    arg_params: Arrays, before: Arrays, classes: tuple[Sequence[str], Sequence[str]], path: str
) -> None:
    """Put the rows of classes that a file's classifier has by the same name into a fresh one."""
    theirs = {plain(name): row for row, name in enumerate(classes[0])}
    pairs = [
        (row, theirs[plain(name)]) for row, name in enumerate(classes[1]) if plain(name) in theirs
    ]
    for name, value in before.items():
        if len(value) != len(classes[0]):
            raise CheckpointError(
                f"{path}: {name} is for {len(value)} classes, {len(classes[0])} names are given"
            )
        for row, source in pairs:
            arg_params[name][row] = value[source]
    if before:
        LOGGER.info(
            "%s: %d of %d classes keep their part of the classifier, by their names",
            path,
            len(pairs),
            len(classes[1]),
        )


def convert(
    source: str,
    prefix: str,
    network: str,
    num_classes: Optional[int] = None,
    epoch: int = 0,
    use_torch: bool = False,
) -> str:
    """Turn a released PyTorch file into an MXNet checkpoint.

    Parameters
    ----------
    source
        The ``.pth`` file.
    prefix
        Of the checkpoint to write.
    network
        Name of the network in it, as in ``get_symbol``.
    num_classes
        By default the number that the file's classifier has.
    epoch
        Number in the file's name.
    use_torch
        Read with ``torch.load(weights_only=True)`` and not with the reader built in.

    Returns
    -------
    str
        Path of the parameters.

    Raises
    ------
    CheckpointError
        If the file is no plain state dict, or does not fit the network.
    """
    state_dict = (read_with_torch if use_torch else read_torch_file)(source)
    if num_classes is None:
        heads = ("classifier.bias", "fc.bias")
        bias = next((v for n, v in state_dict.items() if n.endswith(heads)), None)
        num_classes = None if bias is None else len(bias)
    symbol, input_conf = get_symbol(network, num_classes=num_classes)
    inputs = {"data": (1, *input_conf.data_shape)}
    try:
        return save(prefix, epoch, symbol, *from_torch(state_dict, symbol, inputs))
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not fit {network}: {error}") from error


def verify(
    prefix: str, epoch: Optional[int] = None, data_shape: Optional[Sequence[int]] = None
) -> int:
    """Load a checkpoint and look for values that are not finite.

    Parameters
    ----------
    prefix
        See :func:`checkpoint.paths.find`.
    epoch
        The newest by default.
    data_shape
        Shape of one input, without the batch axis: shapes are compared too.

    Returns
    -------
    int
        Number of values in the arguments.

    Raises
    ------
    CheckpointError
        If a file does not load or does not fit its graph, or a value is not finite.
    """
    symbol, arg_params, aux_params = load(prefix, epoch)
    if data_shape is not None:
        check(symbol, arg_params, aux_params, {"data": (1, *data_shape)}, where=str(prefix))
    bad = [
        name
        for name, value in {**arg_params, **aux_params}.items()
        if not np.isfinite(value.asnumpy()).all()
    ]
    if bad:
        raise CheckpointError(f"{prefix}: values that are not finite in {listing(bad)}")
    return sum(value.size for value in arg_params.values())


def _shape(text: str) -> tuple[int, ...]:
    """Parse ``3,8,224,224``."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 3,8,224,224")
    return shape


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command; see ``python -m network.pretrained --help``."""
    parser = argparse.ArgumentParser(prog=module_command("network.pretrained"), description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("convert", help="turn a PyTorch file into an MXNet checkpoint")
    make.add_argument("source", metavar="FILE.pth")
    make.add_argument("prefix", metavar="PREFIX", help="of the checkpoint to write")
    make.add_argument("--network", required=True, help="such as RESNET50_GLORE")
    make.add_argument("--num-classes", type=int, help="default: as in the file")
    make.add_argument("--epoch", type=int, default=0, help="default: %(default)s")
    make.add_argument(
        "--torch",
        action="store_true",
        help="read with torch.load(weights_only=True) and not with the reader built in; needs "
        "PyTorch (pip install torch)",
    )
    look = commands.add_parser("verify", help="load a checkpoint and check it")
    look.add_argument("prefix", metavar="PREFIX")
    look.add_argument("epoch", metavar="EPOCH", type=int, nargs="?", help="default: the newest")
    look.add_argument("--data-shape", type=_shape, help="compare shapes too: 3,8,224,224")
    arguments = parser.parse_args(argv)
    if arguments.command == "convert":
        path = convert(
            arguments.source,
            arguments.prefix,
            arguments.network,
            arguments.num_classes,
            arguments.epoch,
            arguments.torch,
        )
        print(f"wrote {path}")
    else:
        count = verify(arguments.prefix, arguments.epoch, arguments.data_shape)
        print(f"{arguments.prefix} is sound: {count:,} parameter values, all finite")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
