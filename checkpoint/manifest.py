"""The manifest of a checkpoint (``.json``): what the other files are, and the run they come from.

It is written last and has the SHA-256 of the others and of itself, so that a checkpoint without a
fitting manifest is known to be incomplete. Format 2 describes the whole run; format 1, of earlier
versions of this project, has ``settings`` instead of ``model``, ``options`` and ``data``, and is
still read.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, Optional

from glore_common import sha256_of, write_text

from .params import CheckpointError
from .paths import Files, stem_of

FORMAT = 2
PHASES = ("train", "precise_bn", "validate")
# Of format 1: facts of the data, and an option that had another name.
_DATA_OF_1 = {"batches": None, "workers": 1}
_OPTION_OF_1 = {"seed": "random_seed"}


@dataclasses.dataclass
class Position:
    """Where a run stands, and what it has measured so far.

    Attributes
    ----------
    step
        Optimiser steps done.
    epoch
        Logged epochs completed.
    batch
        Batches of the current logged epoch done.
    phase
        What the current logged epoch does next: one of :data:`PHASES`.
    totals
        Metric sums of the current logged epoch.
    seconds
        Training time of the current logged epoch.
    waited
        Part of ``seconds`` that was spent waiting for input.
    history
        One row per completed logged epoch.
    loss_scale
        See :meth:`train.step.LossScaler.state`.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    phase: str = "train"
    totals: Optional[dict] = None
    seconds: float = 0.0
    waited: float = 0.0
    history: list = dataclasses.field(default_factory=list)
    loss_scale: Optional[list] = None

    def order(self) -> tuple:
        """Return a key that grows as a run advances."""
        return self.epoch, PHASES.index(self.phase), self.batch, self.step


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes
    ----------
    position
        Where the run stood.
    model
        The network as the job describes it: ``task``, ``network``, ``overrides``, ``num_classes``,
        ``class_names`` and ``input``.
    options
        All options of the run by group (``glore_options.as_dict``).
    command_line
        As it was typed.
    versions
        Of Python, NumPy, MXNet and this project.
    data
        What a resumed run must find again: ``batches`` of a pass and ``workers``.
    update_counts
        Updates of each parameter, by name.
    optimizer
        Name of the optimiser's class.
    files
        Size and SHA-256 of the other files, by extension.
    format
        Of the file that was read.
    """

    position: Position
    model: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    command_line: str = ""
    versions: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)
    update_counts: dict = dataclasses.field(default_factory=dict)
    optimizer: str = ""
    files: dict = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def options_of(self, groups: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the options by group; format 1 does not tell the groups apart."""
        return self.options if self.format > 1 else dict.fromkeys(groups, self.options)


def _checksum(content: dict) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _from_format_1(content: dict) -> dict:
    settings = content["settings"]
    data = {name: settings.get(name, default) for name, default in _DATA_OF_1.items()}
    model = {name: settings[name] for name in ("network", "overrides") if name in settings}
    options = {
        _OPTION_OF_1.get(name, name): value
        for name, value in settings.items()
        if name not in data and name not in model
    }
    return {
        **{name: content[name] for name in ("format", "position", "update_counts", "files")},
        "model": model,
        "options": options,
        "data": data,
        "versions": {"mxnet": content.get("mxnet")},
        "optimizer": content.get("optimizer", ""),
    }


def read_manifest(path: str) -> Manifest:
    """Read a manifest; the files that it describes are not looked at.

    Parameters
    ----------
    path
        Of a checkpoint, with or without the extension of one of its files.

    Raises
    ------
    CheckpointError
        If it is missing, damaged or of another format.
    """
    path = Files(stem_of(os.fspath(path))).manifest
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise CheckpointError(f"{path}, the manifest, does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}, the manifest, cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"{path}, the manifest, is damaged: its checksum differs")
    if content.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{path} has format {content.get('format')}, this reads 1 to {FORMAT}: it comes from "
            "another version of this project"
        )
    try:
        content = _from_format_1(content) if content["format"] == 1 else content
        return Manifest(**{**content, "position": Position(**content["position"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no manifest of this project: {error!r}") from error


def write_manifest(path: str, manifest: Manifest) -> None:
    """Write a manifest atomically, with its checksum."""
    # As it will be read: a tuple is a list there, and so on.
    content = json.loads(json.dumps(dataclasses.asdict(manifest)))
    content["checksum"] = _checksum(content)
    write_text(path, json.dumps(content, indent=1))


def facts_of(path: str) -> dict[str, Any]:
    """Return what a manifest keeps of a file."""
    return {"sha256": sha256_of(path), "bytes": os.path.getsize(path)}


def check_files(path: str, manifest: Manifest) -> None:
    """Compare a checkpoint's files with what its manifest says, which reads all of them.

    Parameters
    ----------
    path
        Stem of the checkpoint.

    Raises
    ------
    CheckpointError
        If a file is missing, cut short, or another one.
    """
    for extension, expected in manifest.files.items():
        try:
            size = os.path.getsize(path + extension)
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"{path}{extension} has {size} bytes, it was written with "
                    f"{expected['bytes']}: it is truncated or was replaced"
                )
            if sha256_of(path + extension) != expected["sha256"]:
                raise CheckpointError(f"{path}{extension} is damaged: its checksum differs")
        except OSError as error:
            raise CheckpointError(f"{path}{extension} cannot be read: {error}") from error
