"""Write a checkpoint for other programs: ONNX, a PyTorch state dict, or safetensors.

The file's ending says which: ``.onnx`` for onnxruntime and others, ``.pth`` with the names of
upstream's PyTorch networks, ``.safetensors`` with the same arrays and what the manifest says.
``.pth`` and ``.safetensors`` are read back by ``--pretrained`` and by every command that takes a
checkpoint.
"""

import dataclasses
import logging
import os
import time
from typing import Optional

import numpy as np

from checkpoint.params import Arrays, CheckpointError, numpy_of
from checkpoint.safetensors_file import write_safetensors
from checkpoint.torch_file import write_torch_file
from checkpoint.torch_names import to_mxnet_name, to_torch_name
from glore_common import UsageError, check_writable, command
from glore_options import JobOptions, Options, group, option, parse, positive_float, positive_int
from mxnet_compat import mx
from network.onnx_graph import OnnxError, OnnxNet, difference, write_onnx
from train.report import log_to

from .model import Model, open_model
from .options import WeightsOptions

LOGGER = logging.getLogger("glore")


@dataclasses.dataclass
class ExportFileOptions(Options):
    """What is written, and for which input."""

    title = "export"

    file: Optional[str] = option(
        None,
        "to write; its ending says the form: .onnx, .pth, .safetensors",
        positional=True,
        metavar="FILE",
    )
    crop_size: Optional[int] = option(
        None, "ONNX: side of the input in pixels (default: as in training)", kind=positive_int
    )
    clip_length: Optional[int] = option(
        None, "ONNX: frames of a clip (default: as in training)", kind=positive_int
    )
    check: bool = option(True, "ONNX: compare with MXNet on made-up inputs, by onnxruntime")
    tolerance: float = option(
        1e-5,
        "largest difference of logits that is equal, as a share of the largest logit",
        kind=positive_float,
    )


@dataclasses.dataclass
class ExportOptions(JobOptions):
    """Options of ``export.py``."""

    network: WeightsOptions = group(WeightsOptions)
    export: ExportFileOptions = group(ExportFileOptions)


def torch_arrays(model: Model) -> Arrays:
    """Return a network's parameters under the names of upstream's PyTorch networks.

    Raises
    ------
    CheckpointError
        If a name cannot be told back from PyTorch's.
    """
    params = {**model.arg_params, **model.aux_params}
    found: Arrays = {}
    for name, value in params.items():
        theirs = to_torch_name(name)
        if theirs in found or to_mxnet_name(theirs) != name:
            raise CheckpointError(f"{name} has no PyTorch name of its own: {theirs} is another's")
        found[theirs] = numpy_of(value, name)
    return found


def check_onnx(model: Model, path: str, tolerance: float) -> float:
    """Compare an ONNX file with MXNet on three made-up inputs; return the difference.

    Raises
    ------
    OnnxError
        If they differ by more than ``tolerance`` of the largest logit.
    """
    data = np.random.RandomState(0).standard_normal((3, *model.facts.data_shape))
    net = OnnxNet(path)
    found = difference(net, model.block([mx.cpu()]), data.astype(np.float32))
    if found > tolerance:
        raise OnnxError(
            f"{path}: its logits differ from MXNet's by {found:.1e} of the largest, more than "
            f"--tolerance {tolerance:g}"
        )
    return found


def main(argv: Optional[list[str]] = None) -> None:
    """Export as the command line says."""
    options = parse(ExportOptions(), argv, (__doc__ or "").split("\n\n")[0])
    weights, wanted = options.network, options.export
    path, usage = wanted.file, f"{command('export')} CHECKPOINT FILE.onnx"
    if weights.weights is None or path is None:
        raise UsageError(f"name a checkpoint and the file to write: {usage}")
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".onnx", ".pth", ".safetensors"):
        raise UsageError(f"{path} must end in .onnx, .pth or .safetensors: {usage}")
    check_writable(path, "the exported file")
    with log_to():
        model = open_model(
            weights.weights,
            weights.epoch,
            weights.network,
            weights.overrides(),
            wanted.crop_size,
            wanted.clip_length,
        )
        LOGGER.info("Network    %s (%s)", model.facts.network or model.path, model.origin)
        started = time.perf_counter()
        if ending == ".onnx":
            write_onnx(path, model.onnx())
        elif ending == ".pth":
            write_torch_file(path, torch_arrays(model))
        else:
            # "format" says whose layouts the arrays have; other readers ask for it.
            write_safetensors(path, torch_arrays(model), {**model.metadata(), "format": "pt"})
        LOGGER.info(
            "Written    %s (%.1f MB, %.1f s)",
            path,
            os.path.getsize(path) / 1e6,
            time.perf_counter() - started,
        )
        if ending == ".onnx" and wanted.check:
            found = check_onnx(model, path, wanted.tolerance)
            LOGGER.info(
                "Checked    onnxruntime and MXNet differ by %.1e of the largest logit", found
            )
