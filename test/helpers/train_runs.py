"""Options of a training, for tests."""

from train.options import TrainOptions


def train_options(**flat):
    """Return options of a training; any may be set by its name, whatever its group."""
    options = TrainOptions()
    known = options.fields()
    # Validations as long as they are, whatever ``max_steps``.
    for name, value in {"max_val_batches": 0, "task_name": "t", "end_epoch": 1, **flat}.items():
        setattr(known[name][0], name, value)
    return options
