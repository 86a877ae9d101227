"""Block-parallel training: each rank trains consecutive blocks of the network.

For each batch a rank sends features to the next rank, and sends back to the rank before it the weights that a momentum
auxiliary network there follows. No gradient is sent, so a rank trains on one batch while the next rank still trains on
the batch before:

    rank 0   | batch 0 | batch 1 | batch 2 |
    rank 1        | batch 0 | batch 1 | batch 2 |

Block j's EMA reads the weights that block j + 1 has when batch t begins. These are final after batch t - 1, so a rank
sends them when it begins batch t, and the rank before needs them only at the end of batch t. The result is that of
training in one process, bit for bit.

The inputs are sent with the features only if an objective on a later rank reads them (InfoPro reconstructs them).
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.core.block import Block
from localgrad.core.clock import now
from localgrad.core.partition import cut_by_cost
from localgrad.core.step import apply_updates, local_gradients
from localgrad.core.trees import leaves, mapped
from localgrad.errors import LocalGradError
from localgrad.parallel.messages import Layout, check_targets, dense, flat, wait

Layouts = Any
"""Layouts of the tensors of a batch that a rank receives: a tree with a `Layout` for each tensor."""


class Stage:
    """The blocks that one rank trains in block-parallel training.

    Every rank builds all blocks with the same weights, and a Stage of them. Then:

        stage = Stage(blocks, place(costs, num_stages=2))
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in stage.blocks]
        for inputs, targets, features in stage.batches(loader, sizes):
            losses = stage.step(optimizers, inputs, targets, features)
        stage.gather()                     # every rank has the whole network again

    Args:
        blocks: all blocks from `split`, on this rank's device.
        starts: index of each rank's first block, ascending from 0 (see `place`).
        replicas: number of data-parallel pipelines, each over `len(starts)` consecutive ranks. DDP wraps each block and
            averages its gradients over the pipelines.

    Attributes:
        blocks: the blocks that this rank trains.
        wrapped: the same blocks, each wrapped in DDP if there are replicas; call these.
        own: indices of this rank's blocks among all blocks.
        index: index of this stage, from 0.
        num_stages: number of ranks of a pipeline.
        replica: index of this rank's pipeline, from 0.
        replica_group: the ranks that train the same blocks on other images of a batch, or None.
        is_last_batch: whether the ranks stop after the present batch of `batches`, because its `stop` returned True.

    Raises:
        LocalGradError: torch.distributed has another number of ranks, or a stage would have no block.
    """

    def __init__(self, blocks: Sequence[Block], starts: Sequence[int], replicas: int = 1) -> None:
        self._all, self._edges = list(blocks), [*starts, len(blocks)]
        self.num_stages: int = len(starts)
        _check_stages(self._edges, replicas)
        rank = dist.get_rank()
        self.replica: int = rank // self.num_stages
        self.index: int = rank % self.num_stages
        self.own: range = range(self._edges[self.index], self._edges[self.index + 1])
        self.blocks: list[Block] = self._all[self.own.start : self.own.stop]
        self.wrapped: list[nn.Module] = list(self.blocks)
        self.is_last_batch: bool = False
        self._before = rank - 1 if self.index > 0 else None
        self._after = rank + 1 if self.index < self.num_stages - 1 else None
        self._inputs_go_on = any(_reads_inputs(block) for block in self._all[self.own.stop :])
        self._device = next(parameter for block in self._all for parameter in block.parameters()).device
        # a posted NCCL receive blocks device-wide synchronisation, on which this rank itself may wait: a deadlock
        self._receives_ahead = self._device.type != "cuda"
        self._make_groups(replicas)
        self._layouts: Layouts = None  # layouts of the batches from the rank before, known from the first batch on
        self._announced = False
        self._sends: list[tuple[dist.Work | None, Tensor]] = []
        self._weights: tuple[dist.Work | None, Tensor] | None = None
        self._batch: tuple[Tensor | None, Any] = None, None

    def _make_groups(self, replicas: int) -> None:
        """Make the process groups. Every rank makes all of them, also those that it does not belong to."""
        num_stages = self.num_stages
        self._ranks = [range(n * num_stages, (n + 1) * num_stages) for n in range(replicas)]
        self._pipeline = [_group(ranks) for ranks in self._ranks][self.replica]
        self._control = [_group(ranks, "gloo") for ranks in self._ranks][self.replica]
        # each pair of neighbours has a group for each direction, so that features and weights do not wait in one queue
        neighbours = [pair for ranks in self._ranks for pair in pairwise(ranks)]
        self._down = {pair: _group(pair) for pair in neighbours}
        self._up = {pair: _group(pair) for pair in neighbours}
        self._agreement: dist.ProcessGroup | None = None
        self.replica_group: dist.ProcessGroup | None = None
        if replicas > 1:
            sides = [[ranks[stage] for ranks in self._ranks] for stage in range(num_stages)]
            self.replica_group = [_group(side) for side in sides][self.index]
            self.wrapped = [
                nn.parallel.DistributedDataParallel(block, process_group=self.replica_group) for block in self.blocks
            ]
            # one for each stage, though only that of the first ranks is used: with NCCL all ranks must be in the same
            # number of groups
            self._agreement = [_group(side, "gloo") for side in sides][self.index]

    @property
    def is_first(self) -> bool:
        """Whether this rank reads the data."""
        return self._before is None

    def batches(
        self,
        loader: Iterable[tuple[Tensor, Any]],
        sizes: Sequence[int],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Iterate over the batches of an epoch. A later rank gets each batch when the rank before has sent it.

        Args:
            loader: yields inputs `(N, ...)` and targets: None, or tensors of N samples, also in tuples, lists or dicts.
                Only the first rank reads it.
            sizes: number of samples of each batch, on every rank.
            stop: called on the first rank before each batch. If it returns True, all ranks stop after this batch.

        Returns:
            Iterator of inputs `(N, ...)`, targets, and the features `(N, ...)` for this rank's first block. On the
            first rank the features are the inputs. If no objective on this or a later rank reads the inputs, they are
            not sent, and the features are given in their place.
        """
        source = iter(loader)
        posted = self._post(sizes[0]) if sizes and self._receives_ahead else None
        self.is_last_batch = False
        for number, size in enumerate(sizes):
            self._wait_for_sends()
            if self._before is None:
                inputs, targets = next(source)
                features, self._batch = inputs, (inputs, targets)
                self.is_last_batch = self._agreed(stop())
            else:
                features, inputs, targets = self._received(posted, size)
                self._batch = inputs, targets
                self.is_last_batch = self._receive_flag()
            posted = None
            if self._receives_ahead and number + 1 < len(sizes) and not self.is_last_batch:
                posted = self._post(sizes[number + 1])
            self._start_weights()
            yield features if inputs is None else inputs, targets, features
            if self.is_last_batch:
                break
        self._wait_for_sends()

    def step(self, optimizers: Sequence[Optimizer], inputs: Tensor, targets: Any, features: Tensor) -> list[Tensor]:
        """Train this rank's blocks on a batch, as `local_step` trains all of them.

        Args:
            optimizers: one for each block of this rank.
            inputs, targets, features: a batch from `batches`.

        Returns:
            One detached scalar loss for each block of this rank.
        """
        losses = local_gradients(self.wrapped, inputs, targets, features=features, on_output=self.send)
        self.take_weights()
        apply_updates(self.blocks, optimizers)
        return losses

    def send(self, output: Tensor) -> None:
        """Send the output of this rank's last block to the next rank, with the targets; return at once.

        The inputs are sent too if an objective on a later rank reads them.

        Args:
            output: the detached output, `(N, ...)`.

        Raises:
            LocalGradError: targets hold anything but None and tensors of N samples.
        """
        if self._after is None:
            return
        inputs, targets = self._batch
        batch = mapped(dense, (output, inputs if self._inputs_go_on else None, targets))
        if not self._announced:
            check_targets(targets, len(output))
            dist.send_object_list([mapped(Layout.of, batch)], self._after, group=self._control)
            self._announced = True
        group = self._down[dist.get_rank(), self._after]
        for tensor in filter(torch.is_tensor, leaves(batch)):
            self._sends.append((dist.isend(flat(tensor), self._after, group=group), tensor))
        flag = torch.tensor([self.is_last_batch])
        self._sends.append((dist.isend(flag, self._after, group=self._control), flag))

    def take_weights(self) -> None:
        """Copy the weights with which the next rank began this batch to where this rank's last EMA reads them."""
        followed = self._followed(self.own.stop - 1) if self._after is not None else []
        if not followed:
            return
        work, received = self._weights or self._receive_weights(followed)
        wait(work)
        self._weights = None
        with torch.no_grad():
            start = 0
            for parameter in followed:
                parameter.copy_(received[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()

    def gather(self) -> None:
        """Give every rank of the pipeline all parameters and buffers of all blocks."""
        ranks = self._ranks[self.replica]
        for stage, (start, end) in enumerate(pairwise(self._edges)):
            for block in self._all[start:end]:
                for tensor in [*block.parameters(), *block.buffers()]:
                    dist.broadcast(tensor.detach(), ranks[stage], group=self._pipeline)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all stages of this pipeline, in order, on each of its ranks; tensors are on the CPU."""
        values: list[Any] = [None] * len(self._ranks[self.replica])
        dist.all_gather_object(values, mapped(Tensor.cpu, value), group=self._control)
        return values

    def _followed(self, index: int) -> list[nn.Parameter]:
        """The parameters of block `index + 1` that the EMA of block `index` follows."""
        momentum: Any = self._all[index].momentum
        return [] if momentum is None else momentum.followed()

    def _start_weights(self) -> None:
        if self._before is not None and (followed := self._followed(self.own.start - 1)):
            now = torch.cat([parameter.detach().reshape(-1) for parameter in followed])
            group = self._up[self._before, dist.get_rank()]
            self._sends.append((dist.isend(now, self._before, group=group), now))
        if self._after is not None and (followed := self._followed(self.own.stop - 1)) and self._receives_ahead:
            self._weights = self._receive_weights(followed)

    def _receive_weights(self, followed: Sequence[nn.Parameter]) -> tuple[dist.Work | None, Tensor]:
        assert self._after is not None
        received = followed[0].new_empty(sum(parameter.numel() for parameter in followed))
        return dist.irecv(received, self._after, group=self._up[dist.get_rank(), self._after]), received

    def _post(self, size: int) -> tuple[list[dist.Work | None], Any] | None:
        """Post receives for a batch of `size` samples; None on the first rank, or while the layouts are not known."""
        if self._before is None or self._layouts is None:
            return None
        group = self._down[self._before, dist.get_rank()]
        batch = mapped(lambda layout: layout.empty(size, self._device), self._layouts, Layout)
        tensors = filter(torch.is_tensor, leaves(batch))
        return [dist.irecv(flat(tensor), self._before, group=group) for tensor in tensors], batch

    def _received(self, posted: tuple[list[dist.Work | None], Any] | None, size: int) -> tuple[Tensor, Any, Any]:
        """Wait for features, inputs and targets of a batch, and return them."""
        if posted is None:
            received: list[Any] = [None]
            if self._layouts is None:
                dist.recv_object_list(received, self._before, group=self._control)
                self._layouts = received[0]
            posted = self._post(size)
        assert posted is not None
        for work in posted[0]:
            wait(work)
        return posted[1]

    def _agreed(self, stop: bool) -> bool:
        """Whether `stop` is True on the first rank of any pipeline. The first ranks of all pipelines call this."""
        if self._agreement is None:
            return stop
        flag = torch.tensor([int(stop)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._agreement)
        return bool(flag)

    def _receive_flag(self) -> bool:
        flag = torch.empty(1, dtype=torch.bool)
        dist.recv(flag, self._before, group=self._control)
        return bool(flag)

    def _wait_for_sends(self) -> None:
        for work, _ in self._sends:
            wait(work)
        self._sends.clear()


def _check_stages(edges: Sequence[int], replicas: int) -> None:
    """Refuse a number of processes other than the number of ranks needed, and a rank without a block."""
    num_stages, world_size = len(edges) - 1, dist.get_world_size()
    if num_stages * replicas != world_size:
        raise LocalGradError(
            f"{replicas} pipeline(s) of {num_stages} ranks need {num_stages * replicas} processes, and there are "
            f"{world_size}: start as many, or place the blocks on fewer ranks"
        )
    if edges[0] != 0 or any(end <= start for start, end in pairwise(edges)):
        raise LocalGradError(
            f"starts is {list(edges[:-1])} for {edges[-1]} blocks: give each rank's first block, ascending from 0, "
            "so that every rank has one"
        )


def _reads_inputs(block: Block) -> bool:
    """Whether a block's loss reads the network's inputs; an objective that does not sets `reads_inputs = False`."""
    return block.objective is not None and getattr(block.objective, "reads_inputs", True)


def _group(ranks: Sequence[int] | None = None, backend: str | None = None) -> Any:
    """Make a process group. Every rank of the world must make it, also ranks that do not belong to it."""
    return dist.new_group(None if ranks is None else list(ranks), backend=backend)


def place(costs: Sequence[float], num_stages: int) -> list[int]:
    """First block of each rank, such that the largest cost of a rank is as small as possible.

    Args:
        costs: cost of each block, in any unit of measure, such as the seconds of `block_seconds`.
        num_stages: number of ranks, from 1 to the number of blocks.

    Raises:
        LocalGradError: there are more ranks than blocks.
    """
    if not 1 <= num_stages <= len(costs):
        raise LocalGradError(
            f"{len(costs)} block(s) cannot be placed on {num_stages} ranks: every rank needs a block of its own; "
            "cut the network into more blocks, or use fewer ranks"
        )
    return [0, *(end + 1 for end in cut_by_cost(costs, num_stages))]


def block_seconds(
    blocks: Sequence[Block],
    inputs: Tensor,
    targets: Tensor,
    *,
    context: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    rounds: int = 3,
) -> list[float]:
    """Median seconds of each block's forward and backward pass, measured on copies: the blocks do not change.

    Args:
        blocks: all blocks.
        inputs: a batch of the size that will be trained on, `(N, 3, H, W)`.
        targets: targets of the batch, such as classes `(N,)`.
        context: called with a block's index; returns the context of its forward pass, such as autocast.
        rounds: number of measured passes, after one warm-up pass.
    """
    copies = copy.deepcopy(list(blocks))
    seconds: list[list[float]] = [[] for _ in copies]
    forked: AbstractContextManager[None] = cast("Any", torch.random).fork_rng([inputs.device] if inputs.is_cuda else [])
    with forked:
        for _ in range(1 + rounds):
            features = inputs
            for index, block in enumerate(copies):
                begin = now(inputs.device)
                with context(index):
                    features, loss = block(features.detach(), targets, inputs)
                loss.backward()
                seconds[index].append(now(inputs.device) - begin)
                block.zero_grad()
    return [statistics.median(times[1:]) for times in seconds]
