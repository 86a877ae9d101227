"""Predict the time of the demo: time a few steps and an evaluation of each row that is not trained yet."""

import statistics
from collections.abc import Callable, Sequence

from localgrad.config.schema import TrainConfig
from localgrad.core.clock import now
from localgrad.data.loading import load_images, untold
from localgrad.data.sets import ImageSet
from localgrad.results.step_times import endless_batches
from localgrad.training.build import build_run
from localgrad.training.devices import fast_kernels, make_fabric
from localgrad.training.schedule import set_learning_rate
from localgrad.training.step import train_step
from localgrad.training.trainer import evaluate_epoch

WARM_UP, STEPS = 2, 3
"""Number of steps that do not count, and number of timed steps."""


def predicted_seconds(configs: Sequence[TrainConfig], clock: Callable[[], float] = now) -> float:
    """Predicted seconds of these runs one after the other, on this machine under its current load.

    Configs that differ only in their seed have the same name, and are timed once.

    Args:
        configs: complete configs, all on the same images.
        clock: returns seconds; read before and after the timed work.
    """
    if not configs:
        return 0.0
    images = load_images(configs[0].data)
    rows = {config.name: config for config in configs}
    seconds = {name: _seconds(config, images, clock) for name, config in rows.items()}
    return sum(seconds[config.name] for config in configs)


def _seconds(config: TrainConfig, images: tuple[ImageSet, ImageSet], clock: Callable[[], float]) -> float:
    """Predicted seconds of one run: building it, training steps, and an evaluation after each epoch."""
    fabric = make_fabric(config)
    with fast_kernels(fabric.device):
        began = clock()
        run = build_run(config, images, fabric, untold, fresh=False)
        building = clock() - began
        set_learning_rate(run.optimizers, run.learning_rate, run.rate)
        batches = endless_batches(run, channels_last=config.channels_last)
        steps = [_timed(lambda: train_step(run, *next(batches)), clock) for _ in range(WARM_UP + STEPS)]
        evaluation = _timed(lambda: evaluate_epoch(run), clock)
    epoch = statistics.median(steps[WARM_UP:]) * run.steps_per_epoch + evaluation
    return building + steps[0] + epoch * config.optim.epochs


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin
