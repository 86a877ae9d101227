"""How long the demo will take here: a few timed steps and an evaluation of each row that is not trained yet."""

import statistics
from collections.abc import Callable, Sequence

from localgrad.config.schema import TrainConfig
from localgrad.core.clock import now
from localgrad.data.loading import load_images, untold
from localgrad.data.sets import ImageSet
from localgrad.results.step_times import endless_batches
from localgrad.training.build import build_run
from localgrad.training.devices import fast_kernels, make_fabric
from localgrad.training.run import Run
from localgrad.training.schedule import set_learning_rate
from localgrad.training.step import train_step
from localgrad.training.trainer import evaluate_epoch

WARM_UP, STEPS = 2, 3
"""Steps that are not counted, and steps that are."""


def predicted_seconds(configs: Sequence[TrainConfig]) -> float:
    """Seconds that these runs take one after the other, on this machine as busy as it is now.

    Of each row, which is the config but for its seed, the steps are timed once.

    Args:
        configs: complete runs, all on the same images.
    """
    if not configs:
        return 0.0
    images = load_images(configs[0].data)
    seconds = {config.name: _seconds(config, images) for config in {each.name: each for each in configs}.values()}
    return sum(seconds[config.name] for config in configs)


def _seconds(config: TrainConfig, images: tuple[ImageSet, ImageSet]) -> float:
    """Of one run: its steps and its evaluations, epoch by epoch."""
    fabric = make_fabric(config)
    with fast_kernels(fabric.device):
        began = now()
        run = build_run(config, images, fabric, untold, fresh=False)
        building = now() - began
        set_learning_rate(run.optimizers, run.learning_rate, run.rate)
        batches = endless_batches(run, channels_last=config.channels_last)
        steps = [_timed(lambda: train_step(run, *next(batches))) for _ in range(WARM_UP + STEPS)]
        evaluation = _timed(lambda: evaluate_epoch(run))
    epoch = statistics.median(steps[WARM_UP:]) * _steps_per_epoch(run) + evaluation
    return building + steps[0] + epoch * config.optim.epochs


def _steps_per_epoch(run: Run) -> int:
    return run.train.num_batches(run.batch_size, run.placement.replicas, train=True)


def _timed(work: Callable[[], object]) -> float:
    begin = now()
    work()
    return now() - begin
