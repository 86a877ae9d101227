"""Isolation: hooks cut the model's own forward pass into blocks, and back-propagate each local loss inside it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from localgrad.core.arguments import ForwardArguments
from localgrad.core.auxiliary import build_auxiliaries, follow_model
from localgrad.core.cuts import check_cuts, even_cuts, named_cuts
from localgrad.core.eager import eager
from localgrad.core.isolated_block import IsolatedBlock, chosen_blocks, described, isolated_blocks
from localgrad.core.kept import KeptTensors
from localgrad.core.local_gradients import SUMMED, LocalGradients
from localgrad.core.local_pass import BACKWARD, OUTSIDE, TWICE, LocalPass
from localgrad.core.momentum import Momentum
from localgrad.core.observed import as_arguments, first_floating, observe, tensors_in
from localgrad.core.reach import check_reach
from localgrad.core.recompute import Recomputed
from localgrad.core.replicas import active_ddp, begin_alike, leave_no_more, leave_to_isolation
from localgrad.core.saved_with import AnyOptimizer, keep_in
from localgrad.core.site import Objective
from localgrad.core.steps import Steps
from localgrad.core.tables import hooks_after, hooks_before
from localgrad.core.unchanged import Unchanged
from localgrad.errors import LocalGradError, warn


class Isolation(nn.Module):
    """A model whose forward pass trains its local blocks. `isolate` makes it.

    Its submodules are the auxiliary networks alone, not the model. A forward pass moves them to the model's device.

    Attributes:
        objectives: auxiliary network and local loss of each local block, in order; None for a block that is frozen.
        momenta: momentum auxiliary network of each local block, or None.
        targets: targets of the next batch, for the objectives. Set them before every forward pass, unless an argument
            of the forward pass holds them. The forward pass resets them to None.
        backward: called with each local loss; None means `torch.Tensor.backward`.
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str] | int,
        make: tuple[Any, Momentum | None],
        argument: str | None,
        recompute: bool,
        backward: Callable[[Tensor], Any] | None,
        reach: int,
    ) -> None:
        super().__init__()
        self.objectives: Any = nn.ModuleList()
        self.momenta: Any = nn.ModuleList()
        self.targets: Any = None
        self.backward: Callable[[Tensor], Any] | None = backward
        self._model = (model,)  # a tuple is not registered
        self._cuts, self._make, self._recompute, self._reach = cuts, make, recompute, reach
        self._arguments = ForwardArguments(model, argument)
        self._blocks: list[IsolatedBlock] = []
        self._local: list[nn.Parameter] = []
        self._tied: dict[nn.Parameter, int] = {}
        self._waiting: dict[nn.Parameter, int] = {}
        self._ddp: int | None = None
        self._observing = False
        self._pass: LocalPass | None = None
        self._gradients: LocalGradients | None = None
        self._losses: list[Tensor] = []
        self._hooks: list[tuple[dict[int, Any], Any]] = [
            (hooks_before(model), model.register_forward_pre_hook(self._begin, with_kwargs=True)),
            (hooks_after(model), model.register_forward_hook(self._end, always_call=True)),
        ]

    def build(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model once, build the auxiliary networks and register hooks at the cuts."""
        (model,) = self._model
        self._observing = True
        try:
            run = observe(model, args, kwargs)
        finally:
            self._observing = False
        cuts = even_cuts(run, self._cuts) if isinstance(self._cuts, int) else named_cuts(model, run, self._cuts)
        blocks, self._tied = isolated_blocks(model, run, cuts)
        inputs = self._arguments.inputs(args, kwargs)
        for momentum, objective in list(build_auxiliaries(model, blocks, inputs, *self._make)):
            self.momenta.append(momentum)
            self.objectives.append(objective)
        self._make = cast(Any, None), None  # factories are often closures, which cannot be pickled with the model
        self._blocks, self._local = blocks, [parameter for block in blocks[:-1] for parameter in block.parameters]
        self._install()

    def _auxiliary(self, block: int) -> list[nn.Parameter]:
        """Parameters of a block's auxiliary networks."""
        networks = () if self._blocks[block].unit is None else (self.momenta[block], self.objectives[block])
        return [parameter for network in networks if network for parameter in network.parameters()]

    def _install(self) -> None:
        (model,) = self._model
        for index, block in enumerate(self._blocks[:-1]):
            module = model.get_submodule(block.name)
            self._hooks.append((hooks_after(module), module.register_forward_hook(partial(self._leave, index))))
            if self.momenta[index] is not None:
                module, meet = block.following[0].module, partial(self._meet, index + 1)
                handle = module.register_forward_pre_hook(meet, prepend=True, with_kwargs=True)
                self._hooks.append((hooks_before(module), handle))
        for module in (module for block in self._blocks if self._recompute for module in block.inner):
            module.forward = Recomputed(module)
        leave_to_isolation(model, self._local)
        self._unchanged = Unchanged(model, self._hooks)
        self._steps = Steps(*([p for p in each.parameters() if p.requires_grad] for each in (model, self)))
        self._kept = KeptTensors(model, self._local if self._reach == 1 else [])

    @eager
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: in training, check the model and start a `LocalPass`."""
        if self._blocks and not (self._observing or model.training) and torch.is_grad_enabled():
            self._steps.evaluate()
        if self._observing or not (torch.is_grad_enabled() and model.training):
            return
        if model is not self._model[0]:
            raise LocalGradError("the isolated model runs in DataParallel: use DistributedDataParallel instead")
        if not self._blocks:
            self.build(args, kwargs)
        self._unchanged.check()
        stepped = self._steps.stepped(self.backward in (None, BACKWARD))
        if self.backward is None and not stepped and self._steps.has_gradients():
            warn(SUMMED)
            self.backward = BACKWARD
        follow_model(self, self.momenta, model)
        ddp = active_ddp()
        if ddp is not None and id(ddp) != self._ddp:
            begin_alike(ddp, self._local, self, self._reach)
            self._ddp = id(ddp)
        given, networks = self._arguments.targets(args, kwargs), (self.objectives, self.momenta, self._blocks)
        batch = self.targets if given is None else given, self._arguments.inputs(args, kwargs)
        self._pass = LocalPass(*networks, batch, self.backward or BACKWARD, self._reach)
        trained = [(block.parameters, self._auxiliary(index)) for index, block in enumerate(self._blocks)]
        self._gradients = LocalGradients(trained, tensors_in((args, kwargs)), ddp, stepped, self._gradients)
        self._waiting = {parameter: block for parameter, block in self._tied.items() if parameter.requires_grad}
        for parameter, block in self._waiting.items():
            parameter.requires_grad_(block == 0)

    @eager
    def _leave(self, block: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a cut's module: end the block and return the module's output detached."""
        if self._pass is None:
            if not self._observing and torch.is_grad_enabled() and self._model[0].training:
                raise LocalGradError(OUTSIDE.format(self._blocks[block].name))
            return None
        if block != self._pass.reached or first_floating(output) is None or not torch.is_grad_enabled():
            raise LocalGradError(TWICE.format(self._blocks[block].name))
        for parameter, trainer in self._waiting.items():
            parameter.requires_grad_(block + 1 >= trainer)
        return self._pass.leave(output)

    @eager
    def _meet(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a block's first module: compute the loss of the block before, if it waits for this."""
        if self._pass is None or not self._pass.is_waiting or self._pass.reached != block:
            return None
        return self._pass.meet(module, args, kwargs)

    @eager
    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, also called when the forward pass failed (output None): end the `LocalPass`."""
        done, self._pass = self._pass, None
        if done is None or self._gradients is None:
            return
        self._gradients.set_aside(output)
        self.targets, self._losses = None, done.losses
        for parameter in self._waiting:
            parameter.requires_grad_(True)
        if output is None:
            done.explain()
        else:
            self._kept.refuse_backward()
            done.check_whole()

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the modules after which gradients stop, in order; empty before the first batch or example."""
        return tuple(block.name for block in self._blocks[:-1])

    @property
    def losses(self) -> list[Tensor]:
        """Local losses of the last batch: one detached scalar for each local block that trains."""
        if self._blocks:
            self._unchanged.check()
        return list(self._losses)

    def trainable_parameters(self, block: int | None = None) -> list[nn.Parameter]:
        """Trained parameters of the model and its auxiliary networks, for the optimizer.

        Args:
            block: index of one block, from 0 to K - 1, for one optimizer a block; None for all blocks.
        """
        own = chosen_blocks(self._blocks, block)
        found = [p for index in own for p in (*self._blocks[index].parameters, *self._auxiliary(index))]
        return [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]

    def save_with(self, optimizer: AnyOptimizer) -> AnyOptimizer:
        """Save the auxiliary networks in the optimizer's `state_dict`, and load them from it. Returns the optimizer."""
        return keep_in(optimizer, self)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """State of the auxiliary networks alone; the model has its own `state_dict`."""
        for momentum in self.momenta:
            if momentum is not None:
                momentum.settle()
        return super().state_dict(*args, **kwargs)  # pyright: ignore[reportUnknownVariableType]

    def remove(self) -> None:
        """Remove the hooks, and with them the local losses, from the model. The trained weights keep their values."""
        for _, handle in self._hooks:
            handle.remove()
        for module in (module for block in self._blocks if self._recompute for module in block.inner):
            del module.forward
        leave_no_more(self._model[0], self._local)
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        (model,) = self._model
        if not self._blocks:
            return f"Isolation of {type(model).__name__}, which is cut when it sees its first batch"
        networks = list(zip(self.objectives, self.momenta, strict=True))
        return f"Isolation of {type(model).__name__} in {len(self._blocks)} blocks\n" + described(
            self._blocks, networks
        )


def isolate(
    model: nn.Module,
    cuts: Sequence[str] | None = None,
    *,
    num_blocks: int | None = None,
    objective: Objective | None = None,
    momentum: Momentum | None = None,
    targets: str | None = None,
    example: Any = None,
    recompute: bool = False,
    backward: Callable[[Tensor], Any] | None = None,
    reach: int = 1,
) -> Isolation:
    """Train `model` in gradient-isolated blocks, inside your own training loop.

    Hooks cut the model's own forward pass. Modules that read the output h_j of a cut get it detached. The local loss
    `L_j = objective(momentum(h_j), targets, inputs)` is back-propagated at once, inside `model(...)`, so that memory
    holds the activations of one block at a time. You back-propagate the loss of the model's output, which trains the
    last block. On models that `split` takes, gradients and EMA are those of `local_step`, bit for bit; but the model
    need not be a chain. In evaluation mode and under `no_grad` the hooks do nothing.

    With momentum the local loss is computed when the next block's first module is called. Copies of it get the same
    arguments, such as masks. The EMA is updated once per change of the weights that it follows, before optimizers step.

    A parameter that several blocks use (tied embeddings) is trained by the last of them alone. A block without trained
    parameters has no local loss. Under DistributedDataParallel the isolation averages the local blocks' gradients.

    Args:
        model: any network, not wrapped. Change its layers and add adapters before `isolate`.
        cuts: names of the modules after which gradients stop. `[]` is end-to-end training.
        num_blocks: K, instead of `cuts`: divides the longest chain of modules of one class (such as residual units).
        objective: the local objective, such as `classifier(num_classes=10)`.
        momentum: `man(...)`, `manpp(...)` or None.
        targets: name of the argument of the model's forward pass that holds the targets, such as "labels". Without it,
            set `isolation.targets` before each call.
        example: a batch: a tensor, a tuple of forward's arguments or a dict of them. The model runs on it once, and is
            restored. Without it the first training batch is used, and you make the optimizer after that batch.
        recompute: activation checkpointing of each module of several layers inside a block.
        backward: back-propagates a local loss: `lambda loss: scaler.scale(loss / n).backward()` for a GradScaler and n
            micro-batches, `accelerator.backward`, `fabric.backward`. Scale local losses as you scale your own loss.
        reach: number of blocks that a loss trains, its own included, as in `local_step`.

    Returns:
        The isolation. Give its `trainable_parameters()` to the optimizer.

    Raises:
        LocalGradError: a cut is no module, is not called exactly once, or returns no features; a block reads a tensor
            from inside another block; momentum has no module to copy; the model is wrapped. While training: no targets;
            modules, parameters, dtypes or hooks have changed; the forward pass does not reach a cut.

    Source: as in `split`; cutting by hooks is this library's own.
    """
    check_reach(reach)
    chosen = check_cuts(model, cuts, num_blocks, objective, momentum)
    isolation = Isolation(model, chosen, (objective, momentum), targets, recompute, backward, reach)
    if example is not None:
        try:
            isolation.build(*as_arguments(example))
        except BaseException:
            isolation.remove()
            raise
    return isolation
