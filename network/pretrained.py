"""Save, load, check and convert checkpoints, strictly.

The form on disk is MXNet's own, that of the released ImageNet weights and of ``Module`` users: a
graph ``PREFIX-symbol.json`` and parameters ``PREFIX-0012.params`` whose names begin with ``arg:``
or ``aux:``. The released Kinetics weights of GloRe (Chen et al., CVPR 2019; project
facebookresearch/GloRe) are PyTorch files, which :func:`load_pretrained` takes too and the command
``python -m network.pretrained convert`` turns into MXNet files.

A file that does not fit a network is one error that lists all that is missing, extra or of
another shape. Files are read by a reader of our own that checks every length: MXNet's trusts a
damaged file's numbers.
"""

import argparse
import glob
import json
import logging
import os
import re
import struct

import numpy as np

from checkpoint.gluoncv_names import from_gluoncv
from checkpoint.params import (
    CheckpointError,
    check,
    listing,
    numpy_of,
    param_shapes,
    to_mxnet_name,
    to_torch_name,
    to_torch_names,
)
from checkpoint.torch_file import STREAM_START, ZIP_START, read_torch_file, read_with_torch
from glore_common import UsageError, atomic_path, run_main, write_text
from mxnet_compat import mx

from .initializer import (
    CONTEXTS,
    DEFAULT_RULES,
    UNITS,
    inflate_2d,
    initial_value,
    is_inflatable,
    other_classifier,
)

__all__ = [
    "CheckpointError",
    "check",
    "epochs",
    "find",
    "from_torch",
    "load",
    "load_pretrained",
    "read_params",
    "read_source",
    "save",
    "to_mxnet_name",
    "to_torch_name",
    "to_torch_names",
]

LOGGER = logging.getLogger("glore")

# A list of arrays (src/ndarray/ndarray.cc, NDArray::Save): this number, a reserved one, the number
# of arrays, the arrays, the number of names, the names, all counts in 64 bits.
LIST_MAGIC = 0x112
# Each array begins with one of these numbers; older ones with their number of dimensions.
ARRAY_V1, ARRAY_V2, ARRAY_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "<u1", 4: "<i4", 5: "<i1", 6: "<i8", 7: "<b1"}
MAX_DIMENSIONS = 32


class _Reader:
    """Reads numbers from bytes, and never past their end."""

    def __init__(self, content):
        self.content = content
        self.position = 0

    def take(self, length):
        """Return the next ``length`` bytes, without a copy."""
        if length > len(self.content) - self.position:
            raise CheckpointError(
                f"the file is truncated or damaged: {length} bytes are expected at byte "
                f"{self.position}, {len(self.content) - self.position} are there"
            )
        self.position += length
        return self.content[self.position - length : self.position]

    def numbers(self, form):
        """Return the next numbers, in the form of ``struct`` (little-endian)."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))


def _read_array(reader):
    """Return the next array of a ``.params`` file."""
    (magic,) = reader.numbers("I")
    if magic in (ARRAY_V2, ARRAY_V3):
        storage, ndim = reader.numbers("ii")
        if storage != 0:
            raise CheckpointError("it holds a sparse array, which no network here has")
    elif magic == ARRAY_V1:
        (ndim,) = reader.numbers("i")
    else:
        ndim = magic
    if not 0 < ndim <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"the file is damaged: an array of {ndim} dimensions before byte {reader.position}"
        )
    legacy = magic not in (ARRAY_V1, ARRAY_V2, ARRAY_V3)
    shape = reader.numbers(f"{ndim}{'I' if legacy else 'q'}")
    _device, _index, flag = reader.numbers("iii")
    if flag not in DTYPES or min(shape) < 1:
        raise CheckpointError(
            f"the file is damaged: shape {shape}, type {flag} before byte {reader.position}"
        )
    count = 1
    for size in shape:
        count *= size
    dtype = np.dtype(DTYPES[flag])
    return np.frombuffer(reader.take(count * dtype.itemsize), dtype).reshape(shape)


def read_params(path):
    """Return the arrays of a ``.params`` file.

    Parameters
    ----------
    path : str

    Returns
    -------
    dict
        Name, as in the file, to a NumPy array.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, truncated, damaged or of another kind. It is never loaded
        in part.
    """
    try:
        with open(path, "rb") as stream:
            content = memoryview(stream.read())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise CheckpointError(f"{path} is empty")
    if len(content) < 8 or struct.unpack("<Q", content[:8])[0] != LIST_MAGIC:
        raise CheckpointError(f"{path} is no MXNet .params file{_what_else(bytes(content[:16]))}")
    reader = _Reader(content)
    try:
        _magic, _reserved, count = reader.numbers("QQQ")
        arrays = [_read_array(reader) for _ in range(count)]
        (named,) = reader.numbers("Q")
        names = [bytes(reader.take(reader.numbers("Q")[0])).decode() for _ in range(named)]
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if reader.position != len(content):
        raise CheckpointError(
            f"{path} is damaged: {len(content) - reader.position} bytes follow its end"
        )
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise CheckpointError(
            f"{path} does not name its arrays: {len(arrays)} arrays, {len(set(names))} names"
        )
    return dict(zip(names, arrays))


def _what_else(start):
    """Say what a file looks like by its first bytes."""
    if start.startswith(ZIP_START) or STREAM_START.startswith(start[: len(STREAM_START)]):
        return "; it looks like a PyTorch file (.pth)"
    if start.startswith(b"\x80"):
        return "; it looks like a pickle, which is not loaded: it could run anything"
    if start.lstrip().startswith((b"{", b"<")):
        return "; it is text"
    return ""


def _split(params, where, symbol=None):
    """Split {name in a file: array} into arguments and auxiliary states.

    Names without ``arg:`` and ``aux:``, as Gluon's save_parameters writes them, are told apart by
    ``symbol``.
    """
    parts = {"arg": {}, "aux": {}}
    states = set(symbol.list_auxiliary_states()) if symbol is not None else None
    for name, value in params.items():
        kind, colon, rest = name.partition(":")
        if not (colon and kind in parts):
            if states is None:
                raise CheckpointError(
                    f"{where}: {name[:80]!r} begins with neither arg: nor aux:; this is no "
                    "checkpoint of a symbol"
                )
            kind, rest = ("aux" if name in states else "arg"), name
        if rest in parts[kind]:
            raise CheckpointError(f"{where}: {rest} is there twice")
        parts[kind][rest] = value
    return parts["arg"], parts["aux"]


def epochs(prefix):
    """Return the epochs of which ``PREFIX-NNNN.params`` exists, in ascending order."""
    pattern = re.compile(re.escape(os.path.basename(prefix)) + r"-(\d{4,})\.params")
    found = (
        pattern.fullmatch(os.path.basename(path))
        for path in glob.glob(glob.escape(prefix) + "-*.params")
    )
    return sorted(int(match[1]) for match in found if match)


def paths(prefix, epoch):
    """Return the paths of the symbol and the parameters of a checkpoint."""
    return f"{prefix}-symbol.json", f"{prefix}-{epoch:04d}.params"


def save(prefix, epoch, symbol, arg_params, aux_params=None):
    """Write a checkpoint in MXNet's own form; each file appears whole or not at all.

    Parameters
    ----------
    prefix : str
        Path without ``-symbol.json``; its folder is made.
    epoch : int
    symbol : mx.sym.Symbol
        The plain network, whose parameters must all be there, and no others.
    arg_params : dict
        Name to NDArray or NumPy array; all parameters when ``aux_params`` is not given.
    aux_params : dict, optional

    Returns
    -------
    str
        Path of the parameters.

    Raises
    ------
    CheckpointError
        If names do not fit the symbol.
    """
    if aux_params is None:
        arg_params, aux_params = _split(arg_params, "the parameters", symbol)
    check(symbol, arg_params, aux_params, None)
    symbol_path, params_path = paths(prefix, epoch)
    write_text(symbol_path, symbol.tojson())
    arrays = {}
    for kind, params in (("arg", arg_params), ("aux", aux_params)):
        for name, value in params.items():
            if isinstance(value, mx.nd.NDArray):
                # The file says which device an array was on; a CPU is everywhere.
                value = value.as_in_context(mx.cpu())
            else:
                value = numpy_of(value, name)
                value = mx.nd.array(value, ctx=mx.cpu(), dtype=value.dtype)
            arrays[f"{kind}:{name}"] = value
    with atomic_path(params_path) as temporary:
        mx.nd.save(temporary, arrays)
    return params_path


def read_symbol(path):
    """Return the graph in a ``-symbol.json`` file.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or no graph of MXNet.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
        graph = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or no JSON: {error}") from error
    try:
        # MXNet trusts these numbers.
        nodes = graph["nodes"]
        backward = all(
            0 <= entry[0] < place for place, node in enumerate(nodes) for entry in node["inputs"]
        )
        inside = all(0 <= entry[0] < len(nodes) for entry in graph["heads"])
        arguments = all(0 <= place < len(nodes) for place in graph["arg_nodes"])
        if not (backward and inside and arguments and graph["heads"]):
            raise CheckpointError(f"{path} is damaged: its nodes refer to nodes that are not there")
        return mx.sym.load_json(text)
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is no graph of MXNet") from error
    except mx.MXNetError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} is not understood by MXNet: {reason}") from error


def find(prefix, epoch):
    """Return (prefix of the graph, path of the parameters) of a prefix, or of a path.

    Parameters
    ----------
    prefix : str
        Path without ``-symbol.json``, or path of a ``.params`` file.
    epoch : int, optional
        The newest by default.

    Raises
    ------
    CheckpointError
        If a prefix has no checkpoint.
    UsageError
        If an epoch is given for a file.
    """
    prefix = os.fspath(prefix)
    if prefix.endswith(".params"):
        if epoch is not None:
            raise UsageError(f"{prefix} is one file: it has no epoch {epoch}")
        stem = re.sub(r"(-\d{4,})?\.params$", "", prefix)
        # Checkpoints within an epoch (TASK_step-NNNNNNN) share the graph of those at its end.
        shared = re.sub(r"_step$", "_ep", stem)
        if not os.path.exists(f"{stem}-symbol.json") and os.path.exists(f"{shared}-symbol.json"):
            stem = shared
        return stem, prefix
    if epoch is None:
        known = epochs(prefix)
        if not known:
            raise CheckpointError(
                f"there is neither a file {prefix} nor a checkpoint {prefix}-NNNN.params"
            )
        epoch = known[-1]
    return prefix, paths(prefix, epoch)[1]


def load(prefix, epoch=None):
    """Load a checkpoint with its own graph.

    Parameters
    ----------
    prefix : str
        Path without ``-symbol.json``, or path of a ``.params`` file.
    epoch : int, optional
        The newest by default.

    Returns
    -------
    symbol : mx.sym.Symbol
    arg_params, aux_params : dict
        Name to mx.nd.NDArray on the CPU.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the parameters' names are not those of the graph.
    """
    prefix, path = find(prefix, epoch)
    symbol = read_symbol(f"{prefix}-symbol.json")
    arg_params, aux_params = _split(read_params(path), path, symbol)
    check(symbol, arg_params, aux_params, None, where=path)
    return symbol, _ndarrays(arg_params), _ndarrays(aux_params)


def _ndarrays(params):
    return {
        name: mx.nd.array(value, ctx=mx.cpu(), dtype=value.dtype) for name, value in params.items()
    }


def _standalone_prefix(names, symbol_names):
    """Return what stands before a unit's names in a symbol, when the unit is there alone."""
    known = set(symbol_names)
    if not names or any(name in known for name in names):
        return ""
    first = min(names)
    ends = [name[: -len(first)] for name in symbol_names if name.endswith("_" + first)]
    return ends[0] if len(ends) == 1 else ""


def _our_names(state_dict, symbol):
    """Return {our name: NumPy array} of a PyTorch state dict."""
    found = {}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = to_mxnet_name(name)
        if ours in found:
            raise CheckpointError(f"the state dict has {ours} twice, once as {name}")
        found[ours] = numpy_of(value, name)
    known = symbol.list_arguments() + symbol.list_auxiliary_states()
    prefix = _standalone_prefix(found, known)
    return {prefix + name: value for name, value in found.items()}


def from_torch(state_dict, symbol, input_shapes=None):
    """Make a network's parameters of a PyTorch state dict, strictly.

    Parameters
    ----------
    state_dict : dict
        PyTorch's names, with or without ``module.``, to NumPy arrays or tensors. The names of a
        whole network, or of a GloRe unit alone (``conv_state.weight``, ...) for a symbol that is
        one unit of any name. Entries ``num_batches_tracked`` are left out.
    symbol : mx.sym.Symbol
    input_shapes : dict, optional
        Shape of each input with its batch axis; without it only names are compared.

    Returns
    -------
    arg_params, aux_params : dict
        Name to float32 NumPy array.

    Raises
    ------
    CheckpointError
        One error that lists everything missing, extra or of another shape.
    """
    arg_params, aux_params = _split(_our_names(state_dict, symbol), "the state dict", symbol)
    check(symbol, arg_params, aux_params, input_shapes, where="the state dict's parameters")
    return _float32(arg_params), _float32(aux_params)


def _float32(params):
    return {name: numpy_of(value, name).astype("float32") for name, value in params.items()}


def read_source(source, symbol, epoch=None):
    """Read pretrained parameters of either kind, which is told by the content.

    Parameters
    ----------
    source : str
        An MXNet prefix or ``.params`` file (gluoncv's ResNets too, see
        :mod:`checkpoint.gluoncv_names`), or a PyTorch file.
    symbol : mx.sym.Symbol
        Tells arguments from auxiliary states where the file does not.
    epoch : int, optional
        Of a prefix; the newest by default.

    Returns
    -------
    arg_params, aux_params : dict
        Our names to NumPy arrays, not yet compared with ``symbol``.
    path : str
        The file that was read.
    """
    source = os.fspath(source)
    path = source if os.path.isfile(source) else find(source, epoch)[1]
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(STREAM_START))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if start.startswith(ZIP_START) or start == STREAM_START:
        return (*_split(_our_names(read_torch_file(path), symbol), path, symbol), path)
    return (*_split(from_gluoncv(read_params(path)), path, symbol), path)


def load_pretrained(
    symbol,
    source,
    input_shapes,
    epoch=None,
    classifier="classifier",
    allow_missing=(),
    allow_extra=(),
    seed=0,
    rules=DEFAULT_RULES,
):
    """Load pretrained parameters for a network, whatever kind of file they are in.

    A classifier with another number of classes starts afresh, which the log says. What
    ``allow_missing`` lets be missing starts afresh too. All else must fit. 2D weights are inflated
    for a 3D network (:func:`network.initializer.inflate_2d`), whose units may then be new.

    Parameters
    ----------
    symbol : mx.sym.Symbol
    source : str
        An MXNet prefix or ``.params`` file, or a PyTorch file.
    input_shapes : dict
        Shape of each input with its batch axis: ``{"data": (1, 3, 8, 224, 224)}``.
    epoch : int, optional
        Of a prefix; the newest by default.
    classifier : str
        Name of the last layer.
    allow_missing, allow_extra : sequence of str
        Regular expressions of names that may be missing, or be there in excess (left out).
    seed, rules
        Of fresh values, as in :func:`network.initializer.initial_value`.

    Returns
    -------
    arg_params, aux_params : dict
        All parameters of the network: name to float32 NumPy array.

    Raises
    ------
    CheckpointError
        One error that lists everything missing, extra or of another shape.
    """
    args, auxs = param_shapes(symbol, input_shapes)
    arg_params, aux_params, path = read_source(source, symbol, epoch)
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
    replaced = [
        name
        for name, value in arg_params.items()
        if name in args and other_classifier(name, value.shape, args[name], classifier)
    ]
    if replaced:
        first = replaced[0]
        LOGGER.info(
            "%s: the classifier has %d classes, the network %d: %s start afresh",
            path,
            arg_params[first].shape[0],
            args[first][0],
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

    return complete(args, arg_params), complete(auxs, aux_params)


def convert(source, prefix, network, num_classes=None, epoch=0, use_torch=False):
    """Turn a released PyTorch file into an MXNet checkpoint.

    Parameters
    ----------
    source : str
        The ``.pth`` file.
    prefix : str
        Of the checkpoint to write.
    network : str
        Name of the network in it, as in ``get_symbol``.
    num_classes : int, optional
        By default the number that the file's classifier has.
    epoch : int
    use_torch : bool
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
    from .builder import get_symbol

    state_dict = (read_with_torch if use_torch else read_torch_file)(source)
    if num_classes is None:
        bias = next((v for n, v in state_dict.items() if n.endswith("classifier.bias")), None)
        num_classes = None if bias is None else len(bias)
    symbol, input_conf = get_symbol(network, num_classes=num_classes)
    inputs = {"data": (1, *input_conf.data_shape)}
    try:
        return save(prefix, epoch, symbol, *from_torch(state_dict, symbol, inputs))
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not fit {network}: {error}") from error


def verify(prefix, epoch=None, data_shape=None):
    """Load a checkpoint and look for values that are not finite.

    Parameters
    ----------
    prefix : str
    epoch : int, optional
        The newest by default.
    data_shape : tuple of int, optional
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


def _shape(text):
    """Parse ``3,8,224,224``."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 3,8,224,224")
    return shape


def main(argv=None):
    """Run the command; see ``python -m network.pretrained --help``."""
    parser = argparse.ArgumentParser(prog="python -m network.pretrained", description=__doc__)
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
