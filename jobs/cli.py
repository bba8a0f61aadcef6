"""``glore COMMAND …``: the commands of an installed wheel, as the scripts of a checkout."""

import importlib
import sys
from typing import Optional

from glore_common import UsageError, closest_first, run_main

# Name -> (module of this package with ``main(argv)``, what it does).
COMMANDS = {
    "train-kinetics": ("train_kinetics", "train a video network"),
    "train-imagenet": ("train_imagenet", "train an image network"),
    "train-classifier": ("train_classifier", "train a fine-grained image classifier"),
    "train-segmentation": ("train_segmentation", "train a network that segments images"),
    "train-detection": ("train_detection", "train a network that finds objects on images"),
    "evaluate": ("evaluate", "test a checkpoint on clips, images, images with masks or objects"),
    "predict": ("predict", "say what videos or images show"),
    "extract-features": ("extract_features", "write features, find neighbours"),
    "serve": ("serve", "answer uploaded files over HTTP"),
    "export": ("export", "write a checkpoint as ONNX, .pth or .safetensors"),
    "quantize": ("quantize", "find the ranges that prediction in 8-bit numbers needs"),
    "explain": ("explain", "draw what the blocks of a network do on images or clips"),
    "compare-released": ("compare_released", "compare the released weights with this code"),
    "launch": ("launch", "run a training command as a job of several processes"),
    "doctor": ("doctor", "say what this machine has and lacks"),
}


def usage() -> str:
    """Return the list of the commands."""
    rows = [f"  {name:18}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: glore COMMAND [options]", "", *rows, "", "glore COMMAND --help"])


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else UsageError.exit_code
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        nearest = ", ".join(closest_first(name, COMMANDS)[:3])
        print(f"glore: error: no command {name!r} (closest: {nearest})", file=sys.stderr)
        return UsageError.exit_code
    # What argparse and run_main name in usage and messages.
    sys.argv[0] = f"glore {name}"

    def run(arguments):
        # Imported here: a broken environment is then a message, and `doctor` works without MXNet.
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        return module.main(arguments)

    return run_main(run, rest)
