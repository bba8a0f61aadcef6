"""Options of training: optimiser and schedule, the run, devices, checkpoints, logging."""

import argparse
import dataclasses
import os
import shlex
from typing import Optional, Union

from checkpoint.paths import task_epoch
from glore_common import UsageError
from glore_options import (
    Alias,
    JobOptions,
    Options,
    comma_list,
    count,
    epochs,
    group,
    learning_rate,
    number,
    option,
    positive_float,
    positive_int,
    samples,
    seed,
)

from .optimizer import OPTIMIZERS
from .schedule import SCHEDULES

# Of one process, and of the workers of a job.
KV_STORES = ("device", "local", "nccl", "dist_sync", "dist_device_sync", "dist_async")
DYNAMIC = "dynamic"
# Options of TrainOptions that are 1 or more, whoever sets them.
POSITIVE = (
    "end_epoch",
    "epoch_div_factor",
    "max_steps",
    "accumulate",
    "log_frequency",
    "save_frequency",
)


def gpu_list(text: str) -> tuple[int, ...]:
    """Return the devices of ``--gpus``: ``()`` for a CPU (empty or ``cpu``), else GPU numbers."""
    if text.strip().lower() in ("", "cpu"):
        return ()
    numbers = comma_list(int)(text)
    if any(index < 0 for index in numbers) or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must name different GPUs, counted from 0")
    return numbers


def loss_scale(text: str) -> Union[float, str]:
    """Return the loss scale, or ``dynamic``."""
    return DYNAMIC if text.lower() == DYNAMIC else positive_float(text)


@dataclasses.dataclass
class ScheduleOptions(Options):
    """Which optimiser, and the learning rate over the run."""

    title = "optimiser"
    exclusive = (("lr_steps", "lr_step_epochs"), ("warmup_steps", "warmup_epochs"))

    optimizer: str = option(
        "nesterov",
        "nesterov: PyTorch's form, the learning rate outside of the momentum; sgd: MXNet's plain "
        "momentum; nag: MXNet's Nesterov",
        choices=OPTIMIZERS,
    )
    lr_base: Optional[float] = option(
        0.05, "learning rate after the warm-up", kind=learning_rate, aliases=("--lr",)
    )
    lr_schedule: Optional[str] = option("step", "how the rate falls", choices=SCHEDULES)
    lr_steps: Optional[tuple[int, ...]] = option(
        (),
        "samples after which --lr-schedule step lowers the rate, e.g. 2.4e6,4.8e6",
        kind=comma_list(samples),
        metavar="LIST",
    )
    lr_step_epochs: Optional[tuple[float, ...]] = option(
        None,
        "the same in passes over the data, e.g. 30,60,90",
        kind=comma_list(positive_float),
        aliases=(Alias("--schedule", positive_float, nargs="+", metavar="EPOCH"),),
        metavar="LIST",
    )
    lr_factor: float = option(0.1, "see --lr-steps", kind=learning_rate, aliases=("--gamma",))
    lr_final: float = option(0.0, "last rate of poly and cosine", kind=number(float, 0.0, 1e4))
    lr_power: float = option(0.9, "power of poly", kind=number(float, above=0.0, high=100.0))
    warmup_steps: Optional[int] = option(0, "steps of the linear warm-up", kind=count)
    warmup_epochs: Optional[float] = option(None, "the same in passes over the data", kind=epochs)
    warmup_factor: float = option(
        0.1,
        "share of the rate that the warm-up starts from",
        kind=number(float, high=1.0, above=0.0),
    )
    clip_norm: Optional[float] = option(
        0.0,
        "scale a step's gradients down whose norm, over all weights, is larger; 0: never",
        kind=number(float, 0.0),
    )
    momentum: float = option(
        0.9, "momentum of the optimiser", kind=number(float, 0.0, 0.999), aliases=("--mom",)
    )
    weight_decay: float = option(
        1e-4, "weight decay", kind=number(float, 0.0, 1.0), aliases=("--wd",)
    )


@dataclasses.dataclass
class PreciseBNOptions(Options):
    """Precise BatchNorm after each logged epoch."""

    title = "precise BatchNorm"

    precise_bn: bool = option(
        False,
        "after each logged epoch tune BatchNorm's gammas and betas and re-estimate its statistics",
    )
    precise_bn_batches: tuple[int, int] = option(
        (400, 100),
        "batches for tuning and for the estimate",
        kind=comma_list(count, 2),
        metavar="TUNE,ESTIMATE",
    )

    @property
    def batches(self) -> int:
        """Batches after each logged epoch; 0 without precise BatchNorm."""
        return sum(self.precise_bn_batches) if self.precise_bn else 0


@dataclasses.dataclass
class RunOptions(Options):
    """How long to train, and the seed."""

    title = "run"

    end_epoch: Optional[int] = option(
        None,
        "logged epochs to train",
        kind=positive_int,
        aliases=("--num-epochs", "--epochs"),
    )
    epoch_div_factor: Optional[int] = option(
        1, "logged epochs per pass over the data", kind=positive_int
    )
    max_steps: Optional[int] = option(
        None,
        "stop after this many steps, resumed ones included",
        kind=positive_int,
        compare=False,
    )
    max_val_batches: Optional[int] = option(
        None,
        "batches per validation; 0: no limit (default: as many as --max-steps, if given)",
        kind=count,
        compare=False,
    )
    random_seed: int = option(1, "seed of all randomness", kind=seed, aliases=("--seed",))
    accumulate: int = option(
        1, "batches whose gradients are added up for one step", kind=positive_int
    )
    label_smoothing: float = option(
        0.0,
        "share of each target that is spread over all classes",
        kind=number(float, 0.0, 0.99),
    )

    def settle_epoch_div_factor(self, default: int, batches: int) -> None:
        """Set ``epoch_div_factor``, if it was not given: ``default``, but at least a batch each."""
        if self.epoch_div_factor is None:
            self.epoch_div_factor = max(1, min(default, batches))

    @property
    def val_batch_limit(self) -> int:
        """Most batches of a validation; 0 for no limit.

        A trial of a few steps is not followed by a validation that takes far longer.
        """
        return (self.max_steps or 0) if self.max_val_batches is None else self.max_val_batches


@dataclasses.dataclass
class DeviceOptions(Options):
    """What it runs on."""

    title = "devices"

    gpus: Optional[tuple[int, ...]] = option(
        None,
        "GPU numbers such as 0,1; '' for the CPU (default: all GPUs, else the CPU)",
        kind=gpu_list,
        aliases=("--gpu-id",),
        metavar="LIST",
        compare=False,
    )


@dataclasses.dataclass
class TrainDeviceOptions(DeviceOptions):
    """What a training runs on, and how devices and workers share it."""

    cpus: Optional[int] = option(
        None,
        "divide each batch between N devices of the CPU, as between GPUs (for trials)",
        kind=positive_int,
        metavar="N",
        compare=False,
    )
    kv_store: str = option(
        "device",
        "where the gradients of several devices are added up; dist_...: of the workers of a job, "
        "see run_dist.sh",
        choices=KV_STORES,
        compare=False,
    )
    update_on_kvstore: bool = option(
        False, "the key-value store (its servers) updates the weights; dist_async always does"
    )
    gradient_compression: str = option(
        "none",
        "between workers: two bits for each number, what is lost is added later",
        choices=("none", "2bit"),
    )
    compression_threshold: float = option(
        0.5,
        "2bit: gradients (sums over a batch) become minus this, 0, or this",
        kind=positive_float,
    )
    lr_scaling: str = option(
        "none",
        "linear: the learning rate is multiplied by the number of workers",
        choices=("none", "linear"),
    )
    batch_norm: str = option(
        "local",
        "statistics of each device; of all devices of a process together; or the running ones, "
        "which stay as they are",
        choices=("local", "sync", "frozen"),
    )
    dtype: str = option(
        "float32",
        "type of the network; float16 keeps float32 master weights and is meant for GPUs",
        choices=("float32", "float16"),
    )
    loss_scale: Union[float, str] = option(
        1.0,
        "what the loss is multiplied by before the backward pass (float16: e.g. 128); dynamic: "
        "from 65536, halved by each overflow, doubled after 2000 steps without",
        kind=loss_scale,
        metavar="NUMBER|dynamic",
    )


@dataclasses.dataclass
class CheckpointOptions(Options):
    """Where checkpoints go, how often, how many, and what a run continues from."""

    title = "checkpoints"

    model_dir: str = option("./exps/models", "folder of the checkpoints", compare=False)
    task_name: str = option(
        "", "beginning of all file names (default: made from the rest)", compare=False
    )
    model_prefix: str = option(
        "", "--model-dir and --task-name in one", metavar="DIR/NAME", compare=False
    )
    save_frequency: int = option(
        1, "logged epochs between checkpoints", kind=positive_int, compare=False
    )
    save_every_steps: int = option(
        0, "steps between checkpoints within an epoch; 0: none", kind=count, compare=False
    )
    keep: int = option(
        0, "epoch checkpoints to keep, besides the best one; 0: all", kind=count, compare=False
    )
    resume: str = option(
        "none",
        "continue from the newest whole checkpoint of this task, or from a given one",
        metavar="auto|none|PATH",
        compare=False,
    )
    resume_epoch: int = option(
        -1,
        "continue after this many logged epochs; -1: see --resume",
        kind=number(int, low=-1),
        aliases=("--load-epoch",),
        compare=False,
    )
    on_save_error: str = option(
        "stop",
        "when a checkpoint cannot be written: stop, or continue and try again at the next one",
        choices=("stop", "continue"),
        compare=False,
    )
    share_task_name: bool = option(
        False,
        "do not mind another run that is writing checkpoints of this task to this folder",
        compare=False,
    )
    overwrite: bool = option(
        False,
        "delete checkpoints of this task that are newer than the start instead of refusing",
        compare=False,
    )

    def settle(self) -> None:
        """Take ``model_dir`` and ``task_name`` from ``model_prefix``, where it is given."""
        if self.model_prefix:
            folder, name = os.path.split(self.model_prefix)
            if not name:
                raise UsageError(f"--model-prefix {self.model_prefix} ends in no name: DIR/NAME")
            self.model_dir, self.task_name = folder or ".", name

    def start(self) -> str:
        """Return what to start from: ``none``, ``auto`` or the path of a checkpoint."""
        if self.resume_epoch < 0:
            return self.resume
        if self.resume != "none":
            raise UsageError("give --resume or --resume-epoch, not both")
        return task_epoch(self.model_dir, self.task_name, self.resume_epoch).stem


@dataclasses.dataclass
class LoggingOptions(Options):
    """What is said, how often, and where."""

    title = "logging"

    log_file: str = option("", "log file (default: ./exps/logs/TASK_NAME.log)", compare=False)
    log_frequency: int = option(
        50,
        "batches between step lines",
        kind=positive_int,
        aliases=("--disp-batches",),
        compare=False,
    )
    tensorboard: bool = option(False, "write TensorBoard events beside the log file", compare=False)
    dry_run: bool = option(False, "build everything, run one batch, print the plan", compare=False)
    debug_mode: bool = option(False, "log more", compare=False)


@dataclasses.dataclass
class TrainOptions(JobOptions):
    """What the loop needs to know; the options of a training job have more groups."""

    schedule: ScheduleOptions = group(ScheduleOptions)
    precise_bn: PreciseBNOptions = group(PreciseBNOptions)
    run: RunOptions = group(RunOptions)
    devices: TrainDeviceOptions = group(TrainDeviceOptions)
    checkpoints: CheckpointOptions = group(CheckpointOptions)
    logging: LoggingOptions = group(LoggingOptions)

    def continuation(self) -> str:
        """Return the command that goes on where a run was stopped."""
        words = shlex.split(self.command_line)
        kept = [
            word
            for index, word in enumerate(words)
            if not (word == "--overwrite" or "--resume" in words[max(0, index - 1) : index + 1])
        ]
        kept += [] if "--task-name" in kept else ["--task-name", self.checkpoints.task_name]
        return shlex.join([*kept, "--resume", "auto"])

    def check(self) -> None:
        """Find, before work begins, options that are impossible or do not go together.

        Raises
        ------
        UsageError
            Naming the options.
        """
        for name in POSITIVE:
            members, _ = self.fields()[name]
            value = getattr(members, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        if self.run.end_epoch is None:
            raise UsageError("end_epoch must say how many logged epochs to train")
        if min(self.precise_bn.precise_bn_batches) < 0:
            raise UsageError("precise BatchNorm takes 0 or more batches of each kind")
        for flag, steps in (
            ("--lr-steps", self.schedule.lr_steps),
            ("--lr-step-epochs", self.schedule.lr_step_epochs),
        ):
            if steps and list(steps) != sorted(set(steps)):
                raise UsageError(f"{flag} {','.join(map(str, steps))} must rise")
        self.checkpoints.start()
        devices = self.devices
        distributed = devices.kv_store.startswith("dist")
        if devices.gradient_compression != "none" and not distributed:
            raise UsageError(
                "gradients are compressed between workers only: it needs --kv-store dist_sync"
            )
        if devices.update_on_kvstore or devices.kv_store == "dist_async":
            where = "when the key-value store updates the weights"
            if self.precise_bn.precise_bn:
                raise UsageError(f"precise BatchNorm does not work {where}")
            if self.schedule.clip_norm:
                raise UsageError(f"--clip-norm does not work {where}")
            if devices.loss_scale == DYNAMIC:
                raise UsageError(f"a dynamic loss scale does not work {where}")
