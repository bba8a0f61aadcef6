"""An optimiser that runs on the parameter servers, and its state at the workers' disposal.

With ``--update-on-kvstore`` (always with ``dist_async``) the servers update the weights, and the
workers send gradients and fetch weights. What MXNet 1.9.1 leaves out there:

* ``lr_mult`` and ``wd_mult`` of Gluon's parameters are lost when the optimiser is sent;
* the learning rate that a worker sets does not arrive: here the schedule travels along;
* the optimiser's state cannot be saved: here it can be fetched and restored through keys of their
  own, so that checkpoints are whole;
* figures that are no weights (:class:`train.workers.Group`) would be taken for gradients.

Keys come in blocks (:class:`Keys`): parameter i has key i; the following blocks fetch and restore
the slots of its state; from ``FIGURES`` on there are figures. ps-lite's front end multiplies a key
by 9973 in 32 bits to choose a server, and crashes when that overflows: keys stay below 200,000.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from glore_common import UsageError
from mxnet_compat import mx

from .options import TrainDeviceOptions

if TYPE_CHECKING:
    from .workers import Group

FIGURES, MOST_KEYS = 150_000, 200_000
MOST_PARAMETERS = 10_000
MOST_SLOTS = 4


class Keys:
    """Where the blocks of keys lie.

    A key's server is chosen by the rest of a division by the number of servers. Blocks therefore
    begin at multiples of it: what fetches a state must reach the server that has it.

    Parameters
    ----------
    servers
        How many there are.
    """

    def __init__(self, servers: int) -> None:
        self.block = -(-MOST_PARAMETERS // servers) * servers
        if self.block * (1 + 2 * MOST_SLOTS) > FIGURES:
            raise UsageError(f"--update-on-kvstore does not work with {servers} servers")

    def fetch(self, parameter: int, slot: int) -> int:
        """Return the key whose push fetches a slot of a parameter's state."""
        return self.block * (1 + slot) + parameter

    def restore(self, parameter: int, slot: int) -> int:
        """Return the key whose push restores it."""
        return self.block * (1 + MOST_SLOTS + slot) + parameter

    def meaning(self, key: int) -> tuple[str, int, int]:
        """Return ('weight', 'fetch' or 'restore', parameter, slot) of a key below FIGURES."""
        block, parameter = divmod(key, self.block)
        if block == 0:
            return "weight", parameter, 0
        kind, slot = divmod(block - 1, MOST_SLOTS)
        return ("fetch", "restore")[kind], parameter, slot


class ServerSchedule(mx.lr_scheduler.LRScheduler):
    """A schedule for a server, which counts updates: several for each step of ``dist_async``.

    Parameters
    ----------
    schedule
        Learning rate of a step, from 1.
    updates_per_step
        Updates that make up a step.
    """

    def __init__(self, schedule: Optional[Callable[[int], float]], updates_per_step: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.updates_per_step = updates_per_step

    def __call__(self, num_update: int) -> float:
        """Return the rate of the step to which an update belongs."""
        return self.schedule(-(-num_update // self.updates_per_step))


class RemoteOptimizer(mx.optimizer.Optimizer):
    """Wraps an optimiser for its life on a server.

    Parameters
    ----------
    inner
        What updates the weights; None before there are any.
    workers, servers
        How many there are.
    additive
        Whether figures are added up here (``dist_async``), rather than by the server.
    schedule
        Learning rate of a step, from 1.
    """

    def __init__(
        self,
        inner: Optional[mx.optimizer.Optimizer],
        workers: int,
        servers: int,
        additive: bool,
        schedule: Optional[Callable[[int], float]] = None,
    ) -> None:
        super().__init__()
        self.inner: Any = inner
        self.additive = additive
        self.keys = Keys(servers)
        if inner is not None:
            inner.lr_scheduler = ServerSchedule(schedule, workers if additive else 1)
        self._workers = workers
        self._states: dict[int, Any] = {}
        self._restored: dict[tuple[int, int], mx.nd.NDArray] = {}

    def begin(self, steps: int) -> None:
        """Count from the update after so many steps."""
        self.inner.begin_num_update = steps * (self._workers if self.additive else 1)
        self.inner.num_update = self.inner.begin_num_update

    def __getstate__(self):
        content = super().__getstate__()
        if self.inner is not None:
            # The parameters stay behind; their multipliers go along.
            self.inner.lr_mult = {i: p.lr_mult for i, p in self.param_dict.items()}
            self.inner.wd_mult = {i: p.wd_mult for i, p in self.param_dict.items()}
            self.inner.rescale_grad = self.rescale_grad
        return content

    def create_state_multi_precision(self, index, weight):
        """Return the state of a weight, with the values that were restored; None for others."""
        if index >= FIGURES or self.keys.meaning(index)[0] != "weight":
            return None
        state = self.inner.create_state_multi_precision(index, weight)
        self._states[index] = state
        for slot, array in enumerate(slots_of(state)):
            if (index, slot) in self._restored:
                array[:] = self._restored.pop((index, slot)).reshape(array.shape)
        return state

    def create_state(self, index, weight):
        """Return the same as :meth:`create_state_multi_precision`."""
        return self.create_state_multi_precision(index, weight)

    def update_multi_precision(self, index, weight, grad, state):
        """Update a weight, or do what the key stands for."""
        if index >= FIGURES:
            weight[:] = weight + grad if self.additive else grad
            return
        kind, parameter, slot = self.keys.meaning(index)
        if kind == "weight":
            self.inner.update_multi_precision(index, weight, grad, state)
        elif kind == "restore":
            self._restored[parameter, slot] = grad.copy()
        else:
            slots = slots_of(self._states.get(parameter))
            weight[:] = slots[slot].reshape(weight.shape) if slots else 0

    def update(self, index, weight, grad, state):
        """Do what :meth:`update_multi_precision` does."""
        self.update_multi_precision(index, weight, grad, state)


def slots_of(state: Any) -> tuple:
    """Return an optimiser's state of one weight as a tuple of arrays."""
    if state is None:
        return ()
    slots = state if isinstance(state, (list, tuple)) else (state,)
    return tuple(array for array in slots if array is not None)


class StoreTrainer(mx.gluon.Trainer):
    """A Gluon trainer on a store of its group, or of several devices.

    The optimiser's state is at ``_updaters[0]`` for checkpoints, wherever it lives: call
    :meth:`fetch` before reading it there, and :meth:`send` after writing it.

    Parameters
    ----------
    parameters
        What it updates.
    optimizer
        How.
    options
        ``kv_store``, ``update_on_kvstore`` and the compression of gradients between workers.
    devices
        How many devices each process has.
    group
        The workers.
    schedule
        Learning rate of a step, from 1; needed if servers update.
    """

    def __init__(
        self,
        parameters: Sequence[mx.gluon.Parameter],
        optimizer: mx.optimizer.Optimizer,
        options: TrainDeviceOptions,
        devices: int,
        group: "Group",
        schedule: Optional[Callable[[int], float]] = None,
    ) -> None:
        kvstore = group.store
        if kvstore is None and devices > 1:
            kvstore = options.kv_store
        update_on_kvstore = kvstore is not None and (
            options.update_on_kvstore or group.asynchronous
        )
        if options.gradient_compression != "none" and group.store is not None:
            group.compress(options.compression_threshold)
        self.group = group
        self.remote = update_on_kvstore and group.store is not None
        if self.remote:
            if len(parameters) > MOST_PARAMETERS:
                raise UsageError(f"--update-on-kvstore takes {MOST_PARAMETERS} parameters at most")
            optimizer = RemoteOptimizer(
                optimizer, group.size, group.servers, group.asynchronous, schedule
            )
        super().__init__(
            list(parameters), optimizer, kvstore=kvstore, update_on_kvstore=update_on_kvstore
        )
        self._on_store = update_on_kvstore
        self._first_samples: Optional[int] = None
        self._fetched: set[int] = set()
        self._pulled: dict[int, mx.nd.NDArray] = {}

    def weight_of(self, samples: int) -> float:
        """Return what a step's gradients are multiplied by because of its number of samples.

        The rate at which servers rescale is fixed by the first step: another size is made up for
        here.
        """
        self._first_samples = self._first_samples or samples
        return self._first_samples / samples if self.remote else 1.0

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate, unless the servers have their schedule."""
        if not self.remote:
            super().set_learning_rate(lr)

    def _allreduce_grads(self) -> None:
        # As Gluon's own, but by push and pull: pushpull does not work with compressed gradients.
        if self._kvstore is None:
            return
        trained = [(i, p) for i, p in enumerate(self._params) if p.grad_req != "null"]
        for index, parameter in trained:
            self._kvstore.push(index, parameter.list_grad(), priority=-index)
        for index, parameter in trained:
            if self._update_on_kvstore:
                self._pull_weight(index, parameter)
            else:
                self._kvstore.pull(index, parameter.list_grad(), priority=-index)

    def _pull_weight(self, index: int, parameter: mx.gluon.Parameter) -> None:
        # Not into the weight itself: after a prediction on a CPU oneDNN keeps a 3D kernel in a
        # layout of its own, which neither pull nor copy can write ("Check failed:
        # to.IsDefaultData()"); an operator can.
        weights = parameter.list_data()
        if index not in self._pulled:
            self._pulled[index] = mx.nd.empty(
                weights[0].shape, weights[0].context, weights[0].dtype
            )
        self._kvstore.pull(index, self._pulled[index], priority=-index)
        for weight in weights:
            value = self._pulled[index].as_in_context(weight.context)
            mx.nd.identity(value, out=weight)

    def start(self, samples: float, steps: int) -> None:
        """Make the store and give it the parameters, worker 0's; needed once before the rest.

        Parameters
        ----------
        samples
            Samples (times the scale of the loss) of a step, over all workers.
        steps
            Steps that were done before.
        """
        if self._kv_initialized:
            return
        self._check_and_rescale_grad(self._scale / samples)
        if self.remote:
            self._optimizer.begin(steps)
        self._init_kvstore()
        self._init_params()
        # A worker's pull of the first weights and its push of the first gradients are not ordered
        # by MXNet: the pull could get the sum of the gradients for weights (measured).
        mx.nd.waitall()
        if self._on_store:
            self._send()

    def fetch(self, steps: int) -> None:
        """Bring the optimiser's state here; all workers call it at the same time."""
        if not self._on_store or not self._kv_initialized:
            return
        states = self._updaters[0].states
        if not self.remote:
            states.update(self._kvstore._updater.states)
            return
        for index, parameter, dtypes in self._remote_slots():
            slots = []
            for slot, dtype in enumerate(dtypes):
                key = self._optimizer.keys.fetch(index, slot)
                array = mx.nd.zeros(parameter.shape, dtype=dtype)
                self._know(key, array)
                self._kvstore.push(key, mx.nd.zeros(parameter.shape, dtype=dtype))
                self._kvstore.pull(key, array)
                slots.append(array)
            states[index] = slots[0] if len(slots) == 1 else tuple(slots)
            self._optimizer._index_update_count[index] = steps
        mx.nd.waitall()

    def _remote_slots(self) -> list[tuple[int, mx.gluon.Parameter, list]]:
        """Return (index, parameter, types of the state's slots) of what has a state."""
        result = []
        for index, parameter in enumerate(self._params):
            if parameter.grad_req == "null":
                continue
            like = mx.nd.zeros((1,), dtype=parameter.dtype)
            state = self._optimizer.inner.create_state_multi_precision(index, like)
            if slots_of(state):
                result.append((index, parameter, [array.dtype for array in slots_of(state)]))
        return result

    def _know(self, key: int, like: mx.nd.NDArray) -> None:
        if key not in self._fetched:
            self._kvstore.init(key, mx.nd.zeros(like.shape, dtype=like.dtype))
            self._fetched.add(key)

    def _send(self) -> None:
        """Give the store the state that is at ``_updaters[0]``."""
        states = self._updaters[0].states
        if not self.remote:
            updater = self._kvstore._updater
            updater.states.update(states)
            # Moved to the weights' devices at their next update.
            updater.states_synced.update(dict.fromkeys(states, False))
            return
        for index, _, _ in self._remote_slots():
            for slot, value in enumerate(slots_of(states.get(index))):
                key = self._optimizer.keys.restore(index, slot)
                self._know(key, value)
                if self.group.is_main:
                    self._kvstore.push(key, value.as_in_context(mx.cpu()).copy())
                elif not self.group.asynchronous:
                    self._kvstore.push(key, mx.nd.zeros(value.shape, dtype=value.dtype))
                self._kvstore.pull(key, mx.nd.zeros(value.shape, dtype=value.dtype))
        mx.nd.waitall()
        self.group.store._barrier()
