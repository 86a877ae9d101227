"""Advice for a run that is out of memory."""

import torch

from localgrad.config.build import build_factories, build_model, build_planned
from localgrad.config.methods import DEFAULT_OBJECTIVE
from localgrad.config.schema import TrainConfig
from localgrad.core.units import units
from localgrad.errors import LocalGradError
from localgrad.planning.plan import plan, readable
from localgrad.planning.step_peak import step_peak


def memory_advice(config: TrainConfig, num_classes: int, cuts: list[str], capacity: int | None = None) -> str:
    """The peak memory that `plan` predicts for a step of a run, and the cuts that it proposes instead.

    Everything is computed on the meta device, without memory of the run's device.

    Args:
        config: the config of the run.
        num_classes: number of classes of the images.
        cuts: names of the units after which the run cuts.
        capacity: bytes that a step may use; the first plan below it is proposed, or the smallest if none is or if None.

    Returns:
        A sentence with the flags to give. If the config has no local loss, `DEFAULT_OBJECTIVE` is proposed.
    """
    objective, momentum = build_factories(config, num_classes)
    shares = config.replicas if config.parallel == "blocks" else config.devices
    images = -(-config.optim.batch_size // (shares * config.optim.accumulate))
    whole = config.step_each_block or config.parallel == "blocks"  # these allow no micro-batches
    fewer = "a smaller --optim.batch-size" if whole else f"--optim.accumulate {2 * config.optim.accumulate}"
    smaller = f"fewer images at once, as {fewer}, would take less too"
    try:
        model = build_model(config.model, num_classes).to("meta")
        example = torch.empty(images, 3, config.data.image_size, config.data.image_size, device="meta")
        each = config.step_each_block
        now = step_peak(
            model,
            example,
            cuts,
            objective,
            momentum,
            recompute=config.recompute,
            step_each_block=each,
            reach=config.reach,
        )
        most = len(units(model, example))
        counts = [count for count in (2, 4, 8, 16, 32) if count < most] + [most]
        local = objective or build_planned(DEFAULT_OBJECTIVE, num_classes, config.data.image_size)
        rows = plan(
            model, example, objective=local, momentum=momentum, num_blocks=counts, parts=[1], step_each_block=each
        )
    except (LocalGradError, RuntimeError) as error:
        return f"no plan could be made ({str(error).partition(chr(10))[0]}); {smaller}"
    rows = [row for row in rows if row.recompute is config.recompute]
    least = min(rows, key=lambda row: row.peak)
    best = next((row for row in rows if capacity is not None and row.peak <= capacity), least)
    said = (
        f"`localgrad plan` predicts {readable(now)} for a float32 step of {len(cuts) + 1} block(s) and {images} images"
    )
    if config.reach > 1:
        return f"{said}, with the graphs of {config.reach} blocks alive; --reach 1 or {smaller}"
    if best.peak >= now or best.cuts == tuple(cuts):
        return f"{said}, and no other cuts take less; {smaller}"
    loss = "" if objective else f"--objective.name {DEFAULT_OBJECTIVE} "
    return f"{said}, {readable(best.peak)} with {best.num_blocks} blocks: {loss}--cuts {' '.join(best.cuts)}; {smaller}"
