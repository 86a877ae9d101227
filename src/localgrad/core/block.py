"""A block: a run of units with a local loss."""

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
    """A run of units with a local loss.

    Attributes:
        body: the units, the model's own modules.
        momentum: the momentum auxiliary network, or None.
        objective: the auxiliary network and local loss; None on the last block, and where the body trains nothing.
        criterion: loss of the model's output, or None on all blocks but the last.
        recompute: whether the activations of each unit are computed again in the backward pass.
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
        self.body = nn.Sequential(*(unit.module for unit in found))
        self.momentum = momentum
        self.objective = objective
        self.criterion = criterion
        self.recompute = recompute
        self.names = tuple(unit.name for unit in found)
        self._frozen = found[0].frozen
        # a tuple is not registered a second time
        self._in_place = tuple(unit.module for unit in found if unit.writes_input)
        self._layers = [module for module in self.body.modules() if own_parameters(module)]
        self._modes = [module for module in self.body if isinstance(module, TwoModes)]
        # of the local step: the model that the block is of, what was checked, whether gradients wait for a later step,
        # and whether that is because optimizers have not stepped
        self.origin: Any = None
        self.checked: Any = None
        self.accumulates = False
        self.waits = False
        self.takes: torch.Size | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a block belong to no model, and are checked again."""
        return {**self.__dict__, "origin": None, "checked": None}

    def forward(self, features: Tensor, targets: Any, inputs: Tensor, *, cut_loss: bool = False) -> tuple[Tensor, ...]:
        """Features before the block to features after it, and the block's loss.

        Args:
            features: output of the block before, detached; the inputs for the first block.
            targets: what objective and criterion take, as classes `(N,)`.
            inputs: the batch, `(N, 3, H, W)`; an objective may reconstruct it.
            cut_loss: compute the loss on a leaf of the output's values, so that its graph ends there.

        Returns:
            The body's output, still attached to the block's graph, and a scalar loss; with `cut_loss` the leaf too.
            The loss is 0 for a block that trains nothing and is not the last. The last block's output is the model's.
        """
        # objectives of later blocks read the inputs too, and a leaf cannot be changed
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
        """The parameters to hand to this block's optimizer: all but frozen ones, as the sum's EMA branch is."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_training(self) -> None:
        """Refuse to train in evaluation mode, or after a change of something that the trace keeps as a constant.

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
        """Put the momentum's copies in the mode of what they copy, module by module; nothing where there are none."""
        if isinstance(self.momentum, MomentumAuxiliary):
            self.momentum.match_modes()

    def update_momentum(self) -> None:
        """Move the EMA branch towards the next block's first unit; nothing where there is none."""
        if self.momentum is not None:
            self.momentum.update()  # pyright: ignore[reportCallIssue]

    def local_logits(self, features: Tensor) -> Tensor | None:
        """Class scores of the block's own head, `(N, num_classes)`; the model's output on the last block.

        Args:
            features: output of this block's body.

        Returns:
            None if the objective has no `predict(features)` that gives class scores, or there is no objective.

        Raises:
            LocalGradError: momentum or objective are in training mode, in which scores would change their statistics.
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
        """Tensors of momentum and objective, under `momentum.` and `objective.`.

        The model's own are left out: the body's, and frozen ones that the copies share with the next block.
        """
        shared = self.momentum.shared() if isinstance(self.momentum, MomentumAuxiliary) else []
        left_out = {id(parameter) for parameter in shared}
        names: set[str] = (
            {n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in left_out} if shared else set()
        )
        return {k: v for k, v in self.state_dict().items() if not k.startswith("body.") and k not in names}

    def load_auxiliary_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `auxiliary_state_dict` gave.

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
