"""How a network is learnt: the loop, schedules, optimiser, metrics, checkpoints and reports.

The package takes any Gluon block and any iterable of (data, label) batches; it knows nothing of
``network`` or ``data``. Nothing is imported here, so that ``import train`` stays cheap; take what
is needed from the modules, e.g. ``from train.loop import train_and_evaluate``.
"""
