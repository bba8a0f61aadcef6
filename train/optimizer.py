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
        """Update one weight, or each of lists of them, in place."""
        if isinstance(index, (list, tuple)):
            for each in zip(index, weight, grad, state):
                self.update(*each)
            return
        if grad.stype != "default":
            raise UsageError("NesterovSGD takes dense gradients only")
        self._update_count(index)
        rate, decay = self._get_lr(index), self._get_wd(index)
        if isinstance(state, (list, tuple)):
            momentum, master = state
            self._step(master, grad.astype("float32"), momentum, rate, decay)
            master.astype(weight.dtype).copyto(weight)
        else:
            self._step(weight, grad, state, rate, decay)

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Do what :meth:`update` does: a state that holds a master copy is recognised there."""
        self.update(index, weight, grad, state)

    def _step(self, weight, grad, momentum, rate, decay):
        """Call MXNet's own update twice, or once and a plain one.

        It does ``momentum <- a * momentum - b * (gradient + c * weight)``, and its result is
        ``weight + momentum``. (The operators for several tensors at once take three times as long
        on a CPU.)
        """
        scaling = {"rescale_grad": self.rescale_grad}
        if self.clip_gradient is not None:
            scaling["clip_gradient"] = self.clip_gradient
        # momentum <- mu * momentum + d; the result is not the new weight, and is kept apart.
        total = mx.nd.empty(weight.shape, weight.context)
        mx.nd.sgd_mom_update(
            weight, grad, momentum, lr=-1.0, wd=decay, momentum=self.momentum, out=total, **scaling
        )
        if not self.nesterov:
            mx.nd.sgd_update(weight, momentum, lr=rate, wd=0.0, out=weight)
            return
        # weight - lr * mu * (weight + momentum) - lr * (gradient + (wd - mu) * weight)
        # is weight - lr * (d + mu * momentum).
        mx.nd.sgd_mom_update(
            weight,
            grad,
            total,
            lr=rate,
            wd=decay - self.momentum,
            momentum=-rate * self.momentum,
            out=weight,
            **scaling,
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
