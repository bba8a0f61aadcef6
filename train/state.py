"""A Gluon block and its trainer as arrays by name, and back: what a checkpoint keeps of them."""

from collections.abc import Mapping
from typing import Any

from checkpoint.params import CheckpointError, compare, raise_misfit
from mxnet_compat import mx

STATISTICS = ("moving_mean", "moving_var", "running_mean", "running_var")


def named_parameters(block: mx.gluon.Block) -> dict[str, mx.gluon.Parameter]:
    """Return a block's parameters by name, without the block's own prefix."""
    prefix = block.prefix
    return {
        name[len(prefix) :] if name.startswith(prefix) else name: parameter
        for name, parameter in block.collect_params().items()
    }


def contexts_of_block(block: mx.gluon.Block) -> list[mx.Context]:
    """Return the devices that a block is initialised on, in order."""
    for parameter in block.collect_params().values():
        return list(parameter.list_ctx())
    return [mx.cpu()]


def parameter_arrays(block: mx.gluon.Block) -> dict[str, mx.nd.NDArray]:
    """Return a block's parameters on the CPU under MXNet's ``arg:`` and ``aux:`` names.

    Copies on several devices are averaged: they differ in their running statistics only.
    """
    return {
        ("aux:" if name.endswith(STATISTICS) else "arg:") + name: parameter._reduce()
        for name, parameter in named_parameters(block).items()
    }


def restore_parameters(block: mx.gluon.Block, arrays: Mapping[str, Any], source: str) -> None:
    """Set a block's parameters from :func:`parameter_arrays`, strictly.

    Parameters
    ----------
    block
        The network.
    arrays
        NumPy arrays.
    source
        What messages call them.

    Raises
    ------
    CheckpointError
        Naming the parameters that are missing, extra or of another shape.
    """
    given = {name.split(":", 1)[-1]: value for name, value in arrays.items()}
    wanted = named_parameters(block)
    # A shape that is to come from the first batch is not compared.
    shapes = {
        name: tuple(p.shape) if p.shape and 0 not in p.shape else None for name, p in wanted.items()
    }
    raise_misfit(
        lambda listed: compare(shapes, given, listed=listed),
        f"{source} does not fit the network",
        "Start with the network and number of classes that it was trained with.",
    )
    for name, parameter in wanted.items():
        # As Gluon's own loading: also where the shape was to come from the first batch.
        parameter.shape = given[name].shape
        parameter._load_init(mx.nd.array(given[name], dtype=parameter.dtype), None)


def optimizer_arrays(trainer: mx.gluon.Trainer, names: list[str]) -> dict[str, mx.nd.NDArray]:
    """Return the optimiser's arrays by ``{slot}:{parameter name}``.

    Parameters
    ----------
    trainer
        A trainer that updates outside of its key-value store, or has fetched the state from there.
    names
        The names of its parameters, in its order.
    """
    arrays = {}
    for index, state in trainer._updaters[0].states.items():
        slots = state if isinstance(state, (list, tuple)) else (state,)
        for slot, value in enumerate(slots):
            if value is not None:
                arrays[f"{slot}:{names[index]}"] = value.as_in_context(mx.cpu())
    return arrays


def optimizer_name(trainer: mx.gluon.Trainer) -> str:
    """Return the name of the optimiser's class, also of one that runs on servers."""
    return type(getattr(trainer.optimizer, "inner", trainer.optimizer)).__name__


def update_counts(trainer: mx.gluon.Trainer, names: list[str]) -> dict[str, int]:
    """Return the number of updates of each parameter by name."""
    counts = trainer.optimizer._index_update_count
    return {names[index]: count for index, count in counts.items()}


def restore_optimizer(
    trainer: mx.gluon.Trainer,
    parameters: Mapping[str, mx.gluon.Parameter],
    arrays: Mapping[str, Any],
    counts: Mapping[str, int],
) -> None:
    """Set a trainer's optimiser state from :func:`optimizer_arrays` and :func:`update_counts`.

    Every device gets its own copy.

    Parameters
    ----------
    trainer
        Of these parameters.
    parameters
        By name, in the trainer's order.
    arrays
        NumPy arrays.
    counts
        Updates of each parameter.

    Raises
    ------
    CheckpointError
        If there is a state of an unknown parameter, or of another shape.
    """
    index_of = {name: index for index, name in enumerate(parameters)}
    slots: dict[str, dict[int, Any]] = {}
    for key, value in arrays.items():
        slot, name = key.split(":", 1)
        if name not in index_of or tuple(value.shape) != tuple(parameters[name].shape):
            raise CheckpointError(f"the optimiser state of {name} does not fit the network")
        slots.setdefault(name, {})[int(slot)] = value
    for updater, context in zip(trainer._updaters, trainer._contexts):
        for name, by_slot in slots.items():
            values = tuple(
                mx.nd.array(by_slot[slot], ctx=context, dtype=by_slot[slot].dtype)
                for slot in sorted(by_slot)
            )
            index = index_of[name]
            updater.states[index] = values[0] if len(values) == 1 else values
            updater.states_synced[index] = True
    optimizer = trainer.optimizer
    restored = {index_of[name]: count for name, count in counts.items()}
    # One dictionary per device; the optimiser's current one is among them.
    for device in optimizer._all_index_update_counts.values():
        device.clear()
        device.update(restored)
    for context in trainer._contexts:
        optimizer._all_index_update_counts.setdefault(context.device_id, dict(restored))
    optimizer.num_update = max(restored.values(), default=optimizer.begin_num_update)
