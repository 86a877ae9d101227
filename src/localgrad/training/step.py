"""One optimizer step of a run: micro-batches, gradients, the nonfinite check, clipping, updates."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.core.step import apply_updates, local_gradients
from localgrad.training.cuda_graphs import GraphedStep
from localgrad.training.nonfinite import gradient_norms
from localgrad.training.run import Run, Update

Context = Callable[[int], contextlib.AbstractContextManager[Any]]


def train_step(run: Run, inputs: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
    """One optimizer step of every block of this rank on one batch.

    Random numbers (dropout, say) depend only on the seed, the step, the replica, the micro-batch and the block. So a
    resumed run draws the same numbers, and a block draws the same on any rank of its pipeline.

    Args:
        run: the run.
        inputs: images `(N, 3, H, W)`.
        targets: class indices `(N,)`.
        features: input of this rank's first block; by default the inputs.

    Returns:
        Mean loss of each block of this rank over the batch, before the step, `(own blocks,)`. If a loss or gradient was
        not finite and the step changed nothing, the losses do not count: `run.check.if_allowed` makes them zeros.

    Raises:
        LocalGradError: a loss or gradient is not finite, and the batch may not be skipped. No optimizer of this rank
            has stepped; with `step_each_block`, only those of the blocks before have. With a `DeviceCheck` (on CUDA)
            the error is raised after the next step, which changes nothing either.
    """
    losses, norms = run.update(inputs, targets, features)
    run.check.report(losses, norms)
    return losses


def plain_update(
    run: Run, inputs: Tensor, targets: Tensor, features: Tensor | None = None, seeded: bool = True
) -> tuple[Tensor, Tensor]:
    """The device's work in a step: gradients of each micro-batch, the nonfinite check, clipping, updates.

    Args:
        run: the run.
        inputs, targets, features: as in `train_step`.
        seeded: seed the generator before each block's forward pass, which cannot be captured in a CUDA graph.

    Returns:
        Losses and gradient norms of this rank's blocks, `(own blocks,)` each.
    """
    own, placement = run.placement.own, run.placement
    run.check.before()
    losses, norms = inputs.new_zeros(len(own)), []
    parts = micro_batches(run, inputs, targets)

    def update_block(index: int, loss: Tensor) -> None:
        norms.append(_update(run, own[index : index + 1], loss[None]))

    for number, (part, part_targets, scale) in enumerate(parts, start=1):
        with placement.no_sync() if number < len(parts) else contextlib.nullcontext():
            part_losses = local_gradients(
                placement.wrapped,
                part,
                part_targets,
                features=features,
                scale=scale,
                context=_seeded(run, number) if seeded else lambda index: run.fabric.autocast(),
                reach=run.config.reach,
                on_output=placement.on_output,
                after_block=update_block if run.config.step_each_block else None,
            )
        losses += len(part) / len(inputs) * torch.stack(part_losses)
    if not run.config.step_each_block:
        norms.append(_update(run, own, losses))
    run.check.after()
    return losses, torch.cat(norms)


def _update(run: Run, indices: range, losses: Tensor) -> Tensor:
    """Check, clip and step the blocks with these indices; return their gradient norms before clipping."""
    blocks, first = [run.blocks[index] for index in indices], run.placement.own.start
    norms, clip_norm = gradient_norms(blocks, losses), run.config.optim.clip_norm
    if run.check.allow(losses, norms, indices.start):
        if clip_norm is not None:
            for block, norm in zip(blocks, norms, strict=True):
                nn.utils.clip_grads_with_norm_(block.trainable_parameters(), clip_norm, norm)
        run.placement.before_updates()
        apply_updates(blocks, [run.optimizers[index - first] for index in indices])
    return norms


def micro_batches(run: Run, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """Cut this rank's images of a batch into micro-batches; every rank has the same number of them.

    Returns:
        Inputs, targets and a loss factor for each micro-batch. With the factors, the accumulated gradients are those of
        the mean loss over the whole batch, once data-parallel wrappers have averaged them over the ranks.
    """
    optim, replicas = run.config.optim, run.placement.replicas
    done = run.state.batch * optim.batch_size
    whole = min(optim.batch_size, len(run.train) - done)  # images on all ranks, which may differ by one image
    count = max(1, min(optim.accumulate, whole // replicas))
    pairs = zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True)
    return [(part, part_targets, len(part) * replicas / whole) for part, part_targets in pairs]


def _seeded(run: Run, part: int) -> Context:
    """Context of each block's forward pass: its own seed, and an autocast that frees the block's weight casts."""
    seed = _step_seed(run, part)

    @contextlib.contextmanager
    def forward(index: int) -> Iterator[None]:
        torch.manual_seed(seed + run.placement.own[index])
        with run.fabric.autocast():
            yield

    return forward


def _step_seed(run: Run, part: int) -> int:
    key = np.random.SeedSequence([run.config.seed, run.state.step, run.placement.replica, part])
    return int(key.generate_state(1)[0])


def recorded_update(run: Run) -> Update:
    """`plain_update` replayed as CUDA graphs, with one seed per step. Learning rates must be tensors on the device."""
    graphed = GraphedStep(partial(plain_update, run, seeded=False))

    def update(inputs: Tensor, targets: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(_step_seed(run, 0))
        losses, norms = graphed(inputs, targets)
        return losses, norms

    return update
