"""SGD with Nesterov momentum in the form that the original project's training used.

PyTorch's ``SGD(nesterov=True)`` keeps the learning rate out of the momentum::

    d = gradient + wd * weight
    momentum = mu * momentum + d
    weight = weight - lr * (d + mu * momentum)

MXNet 1.9.1's ``NAG`` documents the same but multiplies the rate into the momentum, which gives
other weights as soon as the rate changes (in a warm-up: at every step).
"""

from typing import Any, Optional

from glore_common import UsageError, closest_first
from mxnet_compat import mx

# MXNet's operator for several tensors at once takes three times as long for a number (on a CPU) as
# the one for a single tensor, and less for a call: it is for tensors that have few numbers. It
# copies its arguments into arrays of fixed size (60 in MXNet 1.9.1) and does not check it.
FEW_NUMBERS, MOST_AT_ONCE = 1 << 14, 32


@mx.optimizer.register
class NesterovSGD(mx.optimizer.Optimizer):
    """SGD with momentum, Nesterov's by default, the learning rate outside of the momentum.

    Works with ``gluon.Trainer`` and as an updater of a key-value store; ``lr_mult`` and
    ``wd_mult`` of the parameters are honoured. Weights in float16 get a float32 master copy, and
    momentum in float32.

    Parameters
    ----------
    learning_rate
        The rate; with an ``lr_scheduler`` it replaces the base rate there. 0.01 without either.
    momentum
        0 to below 1.
    nesterov
        False for plain momentum.
    wd
        Weight decay, added to the gradient.
    rescale_grad
        What gradients are multiplied by first.
    clip_gradient
        Bound of each rescaled gradient element, before the decay is added.
    lr_scheduler
        Maps the update count to a rate.
    param_idx2name, param_dict
        See ``mxnet.optimizer.Optimizer``.
    """

    def __init__(
        self,
        learning_rate: Optional[float] = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        wd: float = 0.0,
        rescale_grad: float = 1.0,
        clip_gradient: Optional[float] = None,
        lr_scheduler: Optional[mx.lr_scheduler.LRScheduler] = None,
        param_idx2name: Optional[dict[int, str]] = None,
        param_dict: Optional[dict[int, mx.gluon.Parameter]] = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum must lie between 0 and 1, not at {momentum}")
        super().__init__(
            learning_rate=learning_rate,
            wd=wd,
            rescale_grad=rescale_grad,
            clip_gradient=clip_gradient,
            lr_scheduler=lr_scheduler,
            param_idx2name=param_idx2name,
            param_dict=param_dict,
            multi_precision=True,
        )
        self.momentum = momentum
        self.nesterov = nesterov
        self.aggregate_num = 2**31 - 1  # have all weights given at once

    def create_state(self, index: int, weight: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return the momentum of a weight: zeros of its shape, in float32."""
        return mx.nd.zeros(weight.shape, weight.context, dtype="float32")

    def create_state_multi_precision(self, index: int, weight: mx.nd.NDArray) -> Any:
        """Return the momentum, or (momentum, float32 copy of the weight) for a float16 weight."""
        momentum = self.create_state(index, weight)
        if weight.dtype == mx.nd.zeros((1,), dtype="float16").dtype:
            return momentum, weight.astype("float32")
        return momentum

    def update(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Update one weight, or lists of them, in place."""
        if not isinstance(index, (list, tuple)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        if any(array.stype != "default" for array in grad):
            raise UsageError("NesterovSGD takes dense gradients only")
        self._update_count(index)
        small: dict[float, list[tuple]] = {}
        rates, decays = self._get_lrs(index), self._get_wds(index)
        for array, change, kept, rate, decay in zip(weight, grad, state, rates, decays):
            if isinstance(kept, (list, tuple)):
                momentum, master = kept
                self._step([(master, change.astype("float32"), momentum, decay)], rate)
                master.astype(array.dtype).copyto(array)
            elif array.size > FEW_NUMBERS:
                self._step([(array, change, kept, decay)], rate)
            else:
                small.setdefault(rate, []).append((array, change, kept, decay))
        for rate, rows in small.items():
            for start in range(0, len(rows), MOST_AT_ONCE):
                self._step(rows[start : start + MOST_AT_ONCE], rate)

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Do what :meth:`update` does: a state that holds a master copy is recognised there."""
        self.update(index, weight, grad, state)

    def _step(self, rows: list[tuple], rate: float) -> None:
        """Update the weights of rows (weight, gradient, momentum, decay) by MXNet's own update."""
        weights, grads, momenta, decays = zip(*rows)
        # momentum <- mu * momentum + d; the result is not the new weight, and is kept apart.
        totals = [mx.nd.empty(weight.shape, weight.context) for weight in weights]
        self._move(weights, grads, momenta, totals, -1.0, decays, self.momentum)
        if not self.nesterov:
            for weight, momentum in zip(weights, momenta):
                mx.nd.sgd_update(weight, momentum, lr=rate, wd=0.0, out=weight)
            return
        # weight - lr * mu * (weight + momentum) - lr * (gradient + (wd - mu) * weight)
        # is weight - lr * (d + mu * momentum).
        less = [decay - self.momentum for decay in decays]
        self._move(weights, grads, totals, weights, rate, less, -rate * self.momentum)

    def _move(self, weights, grads, momenta, out, rate, decays, momentum):
        """``momentum <- a * momentum - rate * (gradient + decay * weight)``, then
        ``out <- weight + momentum``."""
        more = {"momentum": momentum, "rescale_grad": self.rescale_grad}
        if self.clip_gradient is not None:
            more["clip_gradient"] = self.clip_gradient
        if len(weights) == 1:
            arrays = weights[0], grads[0], momenta[0]
            mx.nd.sgd_mom_update(*arrays, lr=rate, wd=decays[0], out=out[0], **more)
            return
        arrays = [array for row in zip(weights, grads, momenta) for array in row]
        rates = (rate,) * len(weights)
        mx.nd.multi_sgd_mom_update(
            *arrays, num_weights=len(weights), lrs=rates, wds=decays, out=list(out), **more
        )


OPTIMIZERS = ("nesterov", "sgd", "nag")


def make_optimizer(name: str, momentum: float, wd: float) -> mx.optimizer.Optimizer:
    """Return an optimiser by name; weights in float16 get a float32 master copy.

    Parameters
    ----------
    name
        :class:`NesterovSGD`, or MXNet's own ``SGD`` or ``NAG``.
    momentum, wd
        Momentum and weight decay.
    """
    if name == "nesterov":
        return NesterovSGD(momentum=momentum, wd=wd)
    if name not in OPTIMIZERS:
        known = ", ".join(closest_first(name, OPTIMIZERS))
        raise UsageError(f"unknown optimiser {name!r}; known are {known}")
    return mx.optimizer.create(name, momentum=momentum, wd=wd, multi_precision=True)
