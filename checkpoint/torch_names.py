"""What a network's parameters are called in PyTorch files.

Our names are those of the released MXNet checkpoints. The PyTorch names are those of the Kinetics
weights of GloRe (Chen et al., CVPR 2019; project facebookresearch/GloRe).
"""

import re
from collections.abc import Iterable
from typing import Union

from mxnet_compat import mx

from .params import CheckpointError, is_label

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
WRAPPERS = ("module.", "model.", "_orig_mod.")
_BRANCH_OF_TORCH = re.compile(r"^conv_(\w\d)$")
_BRANCH_OF_OURS = re.compile(r"^conv-(\w\d)$")


def strip_module(name: str) -> str:
    """Return a PyTorch name without what wrappers of a network put before it.

    These are ``module.`` (DataParallel), ``model.`` (Lightning) and ``_orig_mod.`` (compile, which
    also puts it before the parts that it was called for).
    """
    name = name.replace("._orig_mod.", ".")
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def to_mxnet_name(torch_name: str) -> str:
    """Return our name of a PyTorch parameter.

    ``module.conv3.B01.conv_m1.bn.weight`` is ``conv3_B01_conv-m1_bn_gamma``;
    ``conv3.B01_extra.gcn.conv2.weight`` is ``conv3_B01_extra_GCN-GHW_conv_weight``. A name that is
    none of GloRe's is translated by the same rule: it then shows up as extra in a comparison.
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


def to_torch_name(name: str) -> str:
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
    modules: list[str] = []
    for part in path.split("_") if path else []:
        if part == "extra" and modules:
            modules[-1] += "_extra"
        else:
            modules.append(_BRANCH_OF_OURS.sub(r"conv_\1", part))
    return ".".join([*modules, *([ending] if ending else []), leaf])


def to_torch_names(names: Union[mx.sym.Symbol, Iterable[str]]) -> dict[str, str]:
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
