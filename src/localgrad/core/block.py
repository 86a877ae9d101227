"""A block: consecutive units of a model with a local loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.momentum import MomentumAuxiliary
from localgrad.core.pieces import TwoModes
from localgrad.core.recompute import recomputed
from localgrad.core.site import Criterion
from localgrad.core.tables import own_parameters
from localgrad.core.units import Unit
from localgrad.core.versions import version
from localgrad.errors import LocalGradError


class Block(nn.Module):
    """Consecutive units of a model with a local loss.

    Attributes:
        body: the units, which are the model's own modules.
        momentum: the momentum auxiliary network, or None.
        objective: the auxiliary network and local loss; None on the last block, and where the body trains nothing.
        criterion: loss of the model's output on the last block; None on all other blocks.
        recompute: whether each unit is checkpointed: its activations are computed again in the backward pass.
        names: names of the units.
    """

    def __init__(
        self,
        found: Sequence[Unit],
        momentum: nn.Module | None,
        objective: nn.Module | None,
        criterion: Criterion | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.body: nn.Sequential = nn.Sequential(*(unit.module for unit in found))
        self.momentum: nn.Module | None = momentum
        self.objective: nn.Module | None = objective
        self.criterion: Criterion | None = criterion
        self.recompute: bool = recompute
        self.names: tuple[str, ...] = tuple(unit.name for unit in found)
        self._frozen = found[0].frozen
        # a tuple is not registered a second time
        self._in_place = tuple(unit.module for unit in found if unit.writes_input)
        self._layers = [module for module in self.body.modules() if own_parameters(module)]
        self._modes = [module for module in self.body if isinstance(module, TwoModes)]
        # state of the local step: the model that the block belongs to, the last check, whether gradients are left for
        # a later step, whether that is because optimizers did not step, and the shape of a sample of the example
        self.origin: Any = None
        self.checked: Any = None
        self.accumulates = False
        self.waits = False
        self.takes: torch.Size | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a block belong to no model, and are checked again before they train."""
        return {**self.__dict__, "origin": None, "checked": None}

    def forward(self, features: Tensor, targets: Any, inputs: Tensor, *, cut_loss: bool = False) -> tuple[Tensor, ...]:
        """Run the body on features, and compute the block's loss of its output.

        Args:
            features: output of the block before, detached; the first block gets the inputs.
            targets: targets for objective and criterion, such as classes `(N,)`.
            inputs: the batch, `(N, 3, H, W)`; an objective may reconstruct it.
            cut_loss: compute the loss on the detached output, a new leaf, so that the loss's graph ends there.

        Returns:
            The body's output with its graph, and a scalar loss; with `cut_loss` also the leaf. The loss is 0 for a
            block that trains nothing and is not the last. The last block's output is the model's.
        """
        # a first unit that works in place gets a clone: objectives of later blocks read the inputs too, and autograd
        # refuses to change a leaf
        if self.body[0] in self._in_place and (features.requires_grad or features.data_ptr() == inputs.data_ptr()):
            features = features.clone()
        for unit in self.body:
            features = recomputed(unit, features, unit, unit in self._in_place) if self.recompute else unit(features)
        if not cut_loss:
            return features, self._loss(features, targets, inputs)
        leaf = features.detach().requires_grad_()
        return features, self._loss(leaf, targets, inputs), leaf

    def _loss(self, features: Tensor, targets: Any, inputs: Tensor) -> Tensor:
        if self.objective is None:
            nothing = torch.zeros((), device=features.device)
            return nothing if self.criterion is None else self.criterion(features, targets)
        compiling = torch.compiler.is_compiling()  # version counters cannot be compiled
        before = 0 if compiling else version(features)
        loss = self.objective(self._mixed(features), targets, inputs)
        if not compiling and version(features) != before:
            raise LocalGradError(
                f"the objective of block {self.names[0]}..{self.names[-1]} changes its features in place, and the next "
                "block would get them changed: start it without inplace=True, or with features.clone()"
            )
        return loss

    def _mixed(self, features: Tensor) -> Tensor:
        return features if self.momentum is None else self.momentum(features)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters for this block's optimizer: all that require a gradient. The EMA branch of MAN's sum does not."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_training(self) -> None:
        """Refuse to train in evaluation mode, or after a change of a value that the trace holds as a constant.

        `model.eval()` leaves the body in evaluation mode; `model.train()` does not reach the auxiliary networks.
        """
        self._frozen.check()
        body = not self._layers or any(module.training for module in self._layers)
        if not body or not all(module.training for module in (self.momentum, self.objective, *self._modes) if module):
            raise LocalGradError(
                f"block {self.names[0]}..{self.names[-1]} is in evaluation mode (after model.eval()?), so its norms "
                "and dropout would not train: call block.train() for every block before the next step"
            )

    def match_modes(self) -> None:
        """Give each module of the momentum's copies the training mode of its source; no-op without a momentum."""
        if isinstance(self.momentum, MomentumAuxiliary):
            self.momentum.match_modes()

    def update_momentum(self) -> None:
        """Update the EMA branch towards the next block's first units; no-op without a momentum."""
        if self.momentum is not None:
            self.momentum.update()  # pyright: ignore[reportCallIssue]

    def local_logits(self, features: Tensor) -> Tensor | None:
        """Class scores of the block's own head, `(N, num_classes)`; the model's output on the last block.

        Args:
            features: output of this block's body.

        Returns:
            None if the objective has no `predict(features)` that gives class scores, or there is no objective.

        Raises:
            LocalGradError: momentum or objective is in training mode, where scores would change running statistics.
        """
        if self.objective is None:
            return None if self.criterion is None else features
        predict: Callable[[Tensor], Tensor | None] | None = getattr(self.objective, "predict", None)
        if predict is None:
            return None
        if self.objective.training or (self.momentum is not None and self.momentum.training):
            raise LocalGradError(
                f"the auxiliary networks of block {self.names[0]}..{self.names[-1]} are in training mode, so that "
                "scores would change their statistics: call block.eval() for every block, model.eval() leaves them out"
            )
        return predict(self._mixed(features))

    def auxiliary_state_dict(self) -> dict[str, Tensor]:
        """State of momentum and objective, with keys that begin with `momentum.` and `objective.`.

        Tensors of the model are left out: those of the body, and frozen parameters that the momentum's copies share
        with the next block.
        """
        shared = self.momentum.shared() if isinstance(self.momentum, MomentumAuxiliary) else []
        left_out = {id(parameter) for parameter in shared}
        names: set[str] = (
            {n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in left_out} if shared else set()
        )
        return {k: v for k, v in self.state_dict().items() if not k.startswith("body.") and k not in names}

    def load_auxiliary_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state that `auxiliary_state_dict` returned.

        Raises:
            LocalGradError: keys or shapes are those of another objective or momentum.
        """
        own = self.auxiliary_state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            raise LocalGradError(
                f"auxiliary state of the block {self.names[0]}..{self.names[-1]} does not fit: {wrong[0]!r} and "
                f"{len(wrong) - 1} more differ; load it into a split with the same cuts, objective and momentum"
            )
        self.load_state_dict(state, strict=False)
