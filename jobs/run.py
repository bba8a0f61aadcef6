"""What the training jobs share: from settled options to a trained network and its files."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

import numpy as np

from checkpoint.gluoncv_names import zoo_weights
from checkpoint.manifest import read_manifest
from checkpoint.params import CheckpointError
from checkpoint.paths import Files, find, stem_of
from checkpoint.released import locate
from checkpoint.store import CheckpointStore
from data.common.loader import BatchSource, write_bad_files
from dataset import read_mapping_table
from glore_common import UsageError, check_writable, command
from mxnet_compat import mx
from network.batch_norm import with_batch_norm
from network.block import FINE_TUNE_LR_MULT, build_block
from network.builder import BOXES, PIXELS, InputConf, all_logits, get_spec, resolve
from network.detector import CLASS_LAYERS, HEADS, Detector, freeze
from network.initializer import CONTEXTS, DEFAULT_RULES, PIXEL_HEAD, UNITS
from network.pretrained import load_pretrained
from network.summary import count
from train.devices import contexts_of
from train.loop import Summary, train_and_evaluate
from train.optimizer import make_optimizer
from train.report import Reporter, default_log_file, log_to
from train.schedule import schedule_for
from train.step import Learner
from train.task import Task
from train.trial import benchmark, dry_run
from train.workers import Group, join

from .model import ModelFacts
from .options import TrainJobOptions

LOGGER = logging.getLogger("glore")
# What turns the name of a 2D network into that of one with other heads.
PREFIXES = {"segmentation": PIXELS, "detection": BOXES}


def settle(options: TrainJobOptions, data_name: str) -> None:
    """Fill in what follows from other options, and find mistakes before anything slow starts."""
    network, run, checkpoints = options.network, options.run, options.checkpoints
    spec = get_spec(network.network)
    checkpoints.settle()
    if run.max_val_batches is None:
        # A trial of a few steps is not followed by a validation that takes far longer.
        run.max_val_batches = run.max_steps or 0
    checkpoints.task_name = checkpoints.task_name or f"{data_name}_{spec.name}"
    asked = network.pretrained.lower()
    if asked in ("false", "none"):
        network.pretrained = ""
    elif asked in ("zoo", "true") and not os.path.exists(network.pretrained):
        network.pretrained = zoo_weights(spec.name)
    options.check()
    if not options.logging.dry_run:
        stem = os.path.join(checkpoints.model_dir, checkpoints.task_name)
        check_writable(f"{stem}_ep-0001.params", "the checkpoint")
        log_file = options.logging.log_file or default_log_file(checkpoints.task_name)
        check_writable(log_file, "the log file")


class Run:
    """A training in progress: its options, the workers it is one of, its devices, its log.

    Attributes
    ----------
    options
        Settled.
    group
        The workers.
    contexts
        The devices of this one.
    log_file
        None for a run that writes nothing.
    """

    def __init__(
        self, options: TrainJobOptions, group: Group, contexts: list, log_file: Optional[str]
    ) -> None:
        self.options = options
        self.group = group
        self.contexts = contexts
        self.log_file = log_file

    @property
    def share(self) -> dict[str, int]:
        """Keywords of loaders: which part of the data is this worker's."""
        return {"rank": self.group.rank, "num_ranks": self.group.size}

    def block(
        self,
        symbol: mx.sym.Symbol,
        input_conf: InputConf,
        lr_mult: Any = None,
        wd_mult: Any = None,
        rules: tuple = (),
        class_names: Optional[Sequence[str]] = None,
        frozen: Optional[str] = None,
    ) -> mx.gluon.Block:
        """Return the network as a Gluon block: fresh, or with the weights of ``--pretrained``.

        ``lr_mult`` and ``wd_mult`` are rule sets of :mod:`network.block`; ``--fine-tune`` has its
        own for the learning rate. ``rules`` (:mod:`network.initializer`) go before the default
        ones for what starts afresh. Classes of ``class_names`` that the weights know by the same
        names keep their rows of the classifier. A detector's parameters whose names begin like
        ``frozen``, and the statistics of such BatchNorms, keep their values.
        """
        network, devices = self.options.network, self.options.devices
        seed = self.options.run.random_seed
        if devices.dtype == "float16" and any(c.device_type == "cpu" for c in self.contexts):
            raise UsageError(
                "--dtype float16 is for GPUs: MXNet cannot multiply float16 matrices on a CPU. "
                "Leave it out, or name GPUs with --gpus."
            )
        counted = count(symbol, input_conf)
        LOGGER.info(
            "Network    %s: %s parameters, %.2f G multiply-adds for an input of %s",
            get_spec(network.network).name,
            f"{counted.params:,}",
            counted.macs / 1e9,
            " x ".join(map(str, input_conf.data_shape)),
        )
        params = None
        task = get_spec(network.network).task
        fresh = (UNITS, CONTEXTS) if network.fresh_units else ()
        if task == "segmentation":
            fresh = (*fresh, PIXEL_HEAD)
        elif task == "detection":
            fresh = (*fresh, HEADS)
        graph = with_batch_norm(symbol, devices.batch_norm, self.contexts, frozen)
        if network.pretrained:
            source = locate(network.pretrained)
            known = source_classes(source, network.pretrained_classes)
            params = load_pretrained(
                graph,
                source,
                input_conf.shapes,
                classifier=CLASS_LAYERS if task == "detection" else "classifier",
                allow_missing=fresh,
                allow_extra=("^classifier_",) if task == "detection" else (),
                seed=seed,
                rules=(*rules, *DEFAULT_RULES),
                classes=(known, class_names) if known and class_names else None,
            )
        how: dict[str, Any] = {
            "params": params,
            "seed": seed,
            "lr_mult": FINE_TUNE_LR_MULT if network.fine_tune else lr_mult,
            "wd_mult": wd_mult,
        }
        if task == "detection":
            spec = resolve(network.network, **network.overrides())
            block: Any = Detector(symbol, spec, self.contexts, graph, **how)
            freeze(block, frozen)
        else:
            outputs = [output.name for output in all_logits(symbol)]
            block = build_block(
                graph,
                input_conf,
                ctx=self.contexts,
                initializer=None if params else rules,
                output=outputs if len(outputs) > 1 else outputs[0],
                **how,
            )
            # What checkpoints keep is for any number of devices.
            block.symbol = symbol
        if devices.dtype != "float32":
            block.cast(devices.dtype)
        return block

    def log_schedule(self, train_batches: int) -> None:
        """Log how long the training is going to be, and where its files go."""
        options, group = self.options, self.group
        run, schedule = options.run, options.schedule
        if group.size > 1:
            LOGGER.info(
                "Workers    this is %d of %d (%s); learning rates below %s",
                group.rank,
                group.size,
                options.devices.kv_store,
                f"times {group.size}" if options.devices.lr_scaling == "linear" else "as they are",
            )
        LOGGER.info(
            "Schedule   %d logged epochs of 1/%d pass (%d batches of %d), %s, learning rate %g "
            "(%s)",
            run.end_epoch,
            run.epoch_div_factor,
            -(-train_batches // run.epoch_div_factor),
            options.data.batch_size,
            schedule.optimizer,
            schedule.lr_base,
            schedule.lr_schedule,
        )
        steps = run.end_epoch * -(-train_batches // run.epoch_div_factor)
        warmup = schedule.warmup_steps or 0
        if warmup > steps:
            LOGGER.warning(
                "the warm-up takes %d steps, the run %d: the learning rate never gets to %g",
                warmup,
                steps,
                schedule.lr_base,
            )
        stem = os.path.join(options.checkpoints.model_dir, options.checkpoints.task_name)
        LOGGER.info("Files      %s_*", stem)

    def recipe(self, train_batches: int) -> tuple[Any, Callable[[int], float]]:
        """Return the optimiser and the schedule for passes of so many batches."""
        plan = self.options.schedule
        optimizer = make_optimizer(plan.optimizer, plan.momentum, plan.weight_decay)
        size = self.options.data.batch_size
        return optimizer, schedule_for(self.options, train_batches, size, self.group.size)

    def train(
        self,
        block: mx.gluon.Block,
        loaders: tuple[BatchSource, Optional[BatchSource]],
        facts: ModelFacts,
        task: Optional[Task] = None,
    ) -> Optional[tuple[Summary, Reporter]]:
        """Train, or try one batch with ``--dry-run``; report unreadable files; close the loaders.

        Parameters
        ----------
        block
            From :meth:`block`.
        loaders
            For training and validation; the latter may be None.
        facts
            Kept in checkpoints.
        task
            See :func:`train.loop.train_and_evaluate`.

        Returns
        -------
        What was reached, and who reported it; None after a dry run.
        """
        options, group = self.options, self.group
        train, val = loaders
        self.log_schedule(len(train))
        optimizer, schedule = self.recipe(len(train))
        log_dir = os.path.dirname(self.log_file or "") or "."
        stem = options.checkpoints.task_name
        try:
            if options.logging.dry_run:
                learner = Learner(block, optimizer, self.contexts, options, task, group, schedule)
                dry_run(learner, train, schedule, options.run.random_seed)
                return None
            if group.is_main:
                self._check_room(block)
            reporter = Reporter(
                stem,
                log_dir=log_dir,
                tensorboard=options.logging.tensorboard,
                files=group.is_main,
            )
            summary = train_and_evaluate(
                block,
                train,
                val,
                options,
                optimizer=optimizer,
                schedule=schedule,
                task=task,
                reporter=reporter,
                model=facts.as_dict(),
                group=group,
            )
            return summary, reporter
        finally:
            opened = [loader for loader in loaders if loader is not None]
            if not options.logging.dry_run:
                name = "bad-files" if group.is_main else f"bad-files-worker{group.rank}"
                path = os.path.join(log_dir, f"{stem}_{name}.tsv")
                try:
                    found = write_bad_files(opened, path)
                    if found:
                        LOGGER.warning("%d files could not be read; see %s", found, path)
                except OSError as error:
                    LOGGER.warning("%s cannot be written: %s", path, error.strerror or error)
            for loader in opened:
                loader.close()

    def benchmark(
        self, block: mx.gluon.Block, batch: tuple, steps: int, task: Optional[Task] = None
    ) -> float:
        """Time training steps on one batch that stays in memory; return samples per second."""
        # The schedule's length matters for the rate alone.
        optimizer, schedule = self.recipe(max(steps, self.options.run.epoch_div_factor or 1))
        learner = Learner(block, optimizer, self.contexts, self.options, task, self.group, schedule)
        return benchmark(learner, batch, schedule, self.options.run.random_seed, steps)

    def _check_room(self, block: mx.gluon.Block) -> None:
        """Make sure that the disk has room for one checkpoint."""
        # Weights and, as large as these, the optimiser's momenta.
        values = sum(np.prod(value.shape) for value in block.collect_params().values())
        checkpoints = self.options.checkpoints
        path = os.path.join(checkpoints.model_dir, f"{checkpoints.task_name}_ep-0001.params")
        check_writable(path, "the checkpoint", 2 * 4 * max(0, int(values)))


@contextlib.contextmanager
def started(options: TrainJobOptions) -> Iterator[Run]:
    """Join the workers, open the log, find the devices; to be used in a ``with`` block."""
    logs = options.logging
    writes = not (logs.dry_run or getattr(getattr(options, "images", None), "benchmark", False))
    log_file = None
    if writes:
        checkpoints = options.checkpoints
        log_file = logs.log_file or default_log_file(checkpoints.task_name)
        start = checkpoints.start()
        if start != "auto" and not checkpoints.overwrite:
            # Refused now, not when the data have been read.
            CheckpointStore(checkpoints.model_dir, checkpoints.task_name).choose(start)
    level = logging.DEBUG if logs.debug_mode else logging.INFO
    with (
        join(options.devices.kv_store) as group,
        log_to(log_file if group.is_main else None, level),
    ):
        LOGGER.info("Command    %s", options.command_line)
        yield Run(options, group, contexts_of(options.devices), log_file)


def source_classes(source: str, table: Optional[str] = None) -> Optional[list[str]]:
    """Return the names of the classes of weights: of a mapping table, else of their manifest."""
    if table is not None:
        return read_mapping_table(table)
    try:
        files = Files(stem_of(source)) if os.path.isfile(source) else find(source)
        return read_manifest(files.stem).model.get("class_names")
    except CheckpointError:
        return None


def next_commands(summary: Summary) -> None:
    """Log how to test what was trained."""
    if summary.checkpoint is not None:
        LOGGER.info("Test it    %s %s", command("evaluate"), summary.checkpoint)


def need_task(network: str, task: str) -> None:
    """Raise UsageError unless there is a network of this name that reads what the job trains on."""
    spec = get_spec(network)
    if spec.task != "classification" and spec.task != task:
        raise UsageError(f"{spec.name} is for {spec.task}: {command(f'train_{spec.task}')}")
    if task in PREFIXES and spec.task != task:
        raise UsageError(
            f"{spec.name} has no head for {task}: give --network {PREFIXES[task]}{spec.name}"
        )
    reads_clips = spec.ndim == 3
    if reads_clips and task == "image":
        raise UsageError(
            f"{network} reads clips, this trains on images; for videos: {command('train_kinetics')}"
        )
    if not reads_clips and task == "video":
        raise UsageError(
            f"{network} reads single images, this trains on clips; for images: "
            f"{command('train_imagenet')} or {command('train_classifier')}"
        )
