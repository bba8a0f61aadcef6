"""How a run is carried out: the settings of the training loop."""

import dataclasses
import os
from typing import Optional

from glore_common import UsageError

from .precise_bn import PreciseBN


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run is carried out.

    Attributes
    ----------
    task_name : str
        Beginning of the names of all files.
    end_epoch : int
        Logged epochs to train.
    model_dir : str
        Folder of the checkpoints.
    epoch_div_factor : int
        Logged epochs per pass over the training data; a validation takes the same share of its
        data, spread evenly and always the same batches.
    seed : int
        Source of all randomness in here.
    max_steps : int, optional
        Stop after this many steps, resumed ones included.
    max_val_batches : int
        Upper bound of a validation's batches; 0 for none.
    log_frequency : int
        Batches between step lines; the device is waited for at these only.
    save_frequency : int
        Logged epochs between checkpoints; the last one is always saved.
    save_every_steps : int
        Steps between checkpoints within an epoch; 0 for none.
    keep : int
        See :class:`checkpoint.store.CheckpointStore`.
    resume : str
        ``none``, ``auto`` or the path of a checkpoint.
    overwrite : bool
        Delete checkpoints of this task that are newer than the start, instead of refusing.
    accumulate : int
        Batches whose gradients are added up for one step.
    dtype : str
        Type that the block takes; the block itself is cast by the caller.
    loss_scale : float
        What the loss is multiplied by before the backward pass, and gradients divided by after.
    dynamic_loss_scale : bool
        ``loss_scale`` is but the start: see :class:`train.step.LossScaler`.
    label_smoothing : float
        See :func:`train.loss.cross_entropy`; used in training only.
    precise_bn : PreciseBN, optional
        Precise BatchNorm after each logged epoch.
    kvstore : str
        Key-value store that adds up the gradients of several devices or workers.
    update_on_kvstore : bool
        Whether the store updates the weights; with ``dist_async`` it always does.
    compression : float, optional
        Threshold of MXNet's 2-bit gradient compression between workers; None for none.
    share_task : bool
        Do not mind another run that writes checkpoints of this task.
    """

    task_name: str
    end_epoch: int
    model_dir: str = os.path.join(".", "exps", "models")
    epoch_div_factor: int = 1
    seed: int = 1
    max_steps: Optional[int] = None
    max_val_batches: int = 0
    log_frequency: int = 50
    save_frequency: int = 1
    save_every_steps: int = 0
    keep: int = 0
    resume: str = "none"
    overwrite: bool = False
    accumulate: int = 1
    dtype: str = "float32"
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    label_smoothing: float = 0.0
    precise_bn: Optional[PreciseBN] = None
    kvstore: str = "device"
    update_on_kvstore: bool = False
    compression: Optional[float] = None
    share_task: bool = False

    def __post_init__(self):
        for name in ("end_epoch", "epoch_div_factor", "log_frequency", "save_frequency"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.accumulate < 1:
            raise UsageError(f"accumulate must be 1 or more, not {self.accumulate}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"max_steps must be 1 or more, not {self.max_steps}")
        if self.compression is not None and not self.kvstore.startswith("dist"):
            raise UsageError(
                "gradients are compressed between workers only: it needs --kv-store dist_sync"
            )
        if self.update_on_kvstore or "async" in self.kvstore:
            where = "when the key-value store updates the weights"
            if self.precise_bn is not None:
                raise UsageError(f"precise BatchNorm does not work {where}")
            if self.dynamic_loss_scale:
                raise UsageError(f"a dynamic loss scale does not work {where}")
