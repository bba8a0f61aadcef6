"""A tiny training run, as a worker of a job: python dist_job.py '{"task_name": "t", ...}'.

Keys: options of a training, and ``workers_batch``, ``batches``, ``pause`` (seconds a batch),
``momentum``, ``share`` (of the data: [rank, size] for a run without workers).
"""

import json
import sys
import time

import numpy as np
from train_runs import train_options

from glore_common import run_main
from mxnet_compat import mx
from train import workers as distributed
from train.loop import train_and_evaluate
from train.optimizer import NesterovSGD
from train.report import Reporter, log_to
from train.schedule import ConstantScheduler

CLASSES = 4
VALIDATION = 11


class Share:
    """Every size-th sample of made-up data, from the rank-th on, in batches."""

    def __init__(self, samples, batch, rank, size, pause=0.0, seed=0):
        self.own = np.arange(samples)[rank::size]
        self.batch, self.pause, self.seed = batch, pause, seed
        self.position = (0, 0)

    def __len__(self):
        return (len(self.own) + self.batch - 1) // self.batch

    def set_position(self, pass_index, batch):
        self.position = (pass_index, batch)

    def __iter__(self):
        pass_index, first = self.position
        for number in range(first, len(self)):
            time.sleep(self.pause)
            samples = self.own[number * self.batch : (number + 1) * self.batch]
            rows = [np.random.RandomState([self.seed, pass_index, s]) for s in samples]
            label = np.array([row.randint(CLASSES) for row in rows])
            data = np.stack([row.normal(0, 1, (6, 5, 5)) for row in rows])
            data[np.arange(len(samples)), label] += 1.0
            yield mx.nd.array(data), mx.nd.array(label)


def network():
    """Return a network of two layers without BatchNorm or dropout."""
    block = mx.gluon.nn.HybridSequential(prefix="net_")
    with block.name_scope():
        block.add(mx.gluon.nn.Conv2D(8, 3, in_channels=6), mx.gluon.nn.Activation("tanh"))
        block.add(mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Dense(CLASSES, in_units=8))
    block.initialize()
    # Not MXNet's generator: what it draws depends on the number of threads.
    generator = np.random.RandomState(0)
    for parameter in block.collect_params().values():
        parameter.set_data(mx.nd.array(generator.normal(0, 0.2, parameter.shape)))
    block.hybridize()
    return block


def train(group, batch=4, batches=5, pause=0.0, momentum=0.9, contexts=None, **options):
    """Train; return the summary and the block. ``batch`` is that of each worker."""
    samples = batch * batches * group.size
    settled = train_options(**{"end_epoch": 2, "log_frequency": 2, **options})
    block = network()
    if contexts:
        block.collect_params().reset_ctx(contexts)
    summary = train_and_evaluate(
        block,
        Share(samples, batch, group.rank, group.size, pause),
        Share(VALIDATION, 3, group.rank, group.size, seed=1),
        settled,
        optimizer=NesterovSGD(momentum=momentum, wd=1e-3),
        schedule=ConstantScheduler(0.2, warmup_steps=4),
        reporter=Reporter(
            settled.checkpoints.task_name, settled.checkpoints.model_dir, files=group.is_main
        ),
        group=group,
    )
    return summary, block


def main(argv):
    """Train as the JSON says; ``--resume auto`` may follow."""
    options = json.loads(argv[0])
    if "--resume" in argv:
        options["resume"] = argv[argv.index("--resume") + 1]
    with distributed.join(options["kv_store"]) as group, log_to():
        train(group, **options)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
