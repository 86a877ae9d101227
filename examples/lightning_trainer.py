"""Lightning's Trainer, training in gradient-isolated blocks.

    python examples/lightning_trainer.py
    python examples/lightning_trainer.py --epochs 20 --accumulate 2

The lines that `localgrad` adds are marked. The model is a CIFAR-type ResNet, trained on the first 1,500 of
scikit-learn's digits (1,797 images of 8 x 8). The isolation is a submodule of the LightningModule, so checkpoints
contain the auxiliary networks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import localgrad  # added
from localgrad.models import cifar_resnet


class Digits(lightning.LightningModule):
    """A classifier of digits."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.net = cifar_resnet(14)
        objective, example = localgrad.dgl(num_classes=10), torch.zeros(2, 3, 8, 8)  # added
        self.isolation = localgrad.isolate(self.net, num_blocks=3, objective=objective, example=example)  # added
        self.isolation.backward = lambda loss: (loss / accumulate).backward()  # added

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, classes = batch
        self.isolation.targets = classes  # added
        loss = F.cross_entropy(self.net(inputs), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # includes the auxiliary networks


def main(arguments: Sequence[str] | None = None) -> lightning.Trainer:
    """Train, print the loss of the last block, and return the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="number of training images")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints; by default none are written")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    train = torch.utils.data.TensorDataset(inputs[: options.images], torch.tensor(classes)[: options.images])
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        accelerator=options.accelerator,
        default_root_dir=options.folder,
        enable_checkpointing=options.folder is not None,
        logger=False,
    )
    trainer.fit(Digits(options.accumulate), torch.utils.data.DataLoader(train, batch_size=100, shuffle=True))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
