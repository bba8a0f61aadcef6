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

# The multi-tensor operators copy their arguments into arrays of fixed size (60 in MXNet 1.9.1) and
# do not check it.
MOST_AT_ONCE = 32


def _interleave(*lists):
    return [item for group in zip(*lists) for item in group]


@mx.optimizer.register
class NesterovSGD(mx.optimizer.Optimizer):
    """SGD with momentum, Nesterov's by default, the learning rate outside of the momentum.

    Works with ``gluon.Trainer`` and as an updater of a key-value store; ``lr_mult`` and
    ``wd_mult`` of the parameters are honoured. Up to 32 parameters are updated by three fused
    operators. Weights in float16 get a float32 master copy, and momentum in float32.

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
        self.aggregate_num = MOST_AT_ONCE

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
        """Update one weight, or lists of up to any number of weights, in place."""
        if not isinstance(index, (list, tuple)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        for array in grad:
            if array.stype != "default":
                raise UsageError("NesterovSGD takes dense gradients only")
        self._update_count(index)
        rates, decays = self._get_lrs(index), self._get_wds(index)
        for start in range(0, len(index), MOST_AT_ONCE):
            part = slice(start, start + MOST_AT_ONCE)
            self._update_part(weight[part], grad[part], state[part], rates[part], decays[part])

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Do what :meth:`update` does: a state that holds a master copy is recognised there."""
        self.update(index, weight, grad, state)

    def _update_part(self, weights, grads, states, rates, decays):
        masters, momenta, full_grads = [], [], []
        for weight, grad, state in zip(weights, grads, states):
            has_master = isinstance(state, (list, tuple))
            momenta.append(state[0] if has_master else state)
            masters.append(state[1] if has_master else weight)
            full_grads.append(grad.astype("float32") if has_master else grad)
        self._step(masters, full_grads, momenta, rates, decays)
        for weight, master in zip(weights, masters):
            if master is not weight:
                master.astype(weight.dtype).copyto(weight)

    def _step(self, weights, grads, momenta, rates, decays):
        count = len(weights)
        scaling = {"rescale_grad": self.rescale_grad}
        if self.clip_gradient is not None:
            scaling["clip_gradient"] = self.clip_gradient
        # momentum <- mu * momentum + d: MXNet's own update with a rate of -1. The weights it
        # writes are of no use; they go to scratch arrays (an output must be given).
        scratch = [mx.nd.empty(weight.shape, weight.context) for weight in weights]
        mx.nd.multi_sgd_mom_update(
            *_interleave(weights, grads, momenta),
            num_weights=count,
            lrs=(-1.0,) * count,
            wds=decays,
            momentum=self.momentum,
            out=scratch,
            **scaling,
        )
        if self.nesterov:
            # weight <- weight - lr * d
            mx.nd.multi_sgd_update(
                *_interleave(weights, grads),
                num_weights=count,
                lrs=rates,
                wds=decays,
                out=weights,
                **scaling,
            )
            rates = [rate * self.momentum for rate in rates]
        # weight <- weight - lr * mu * momentum (plain momentum: without mu)
        mx.nd.multi_sgd_update(
            *_interleave(weights, momenta),
            num_weights=count,
            lrs=rates,
            wds=(0.0,) * count,
            out=weights,
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
