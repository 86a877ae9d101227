"""A loop with Accelerate and gradient accumulation, trained in gradient-isolated blocks.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --accumulate 4

The lines that `localgrad` adds or changes are marked. The model is a CIFAR-type ResNet, trained on the first 1,500 of
scikit-learn's digits (1,797 images of 8 x 8).
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits

import localgrad  # added
from localgrad.models import cifar_resnet


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; print and return the last loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="number of training images")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    train = torch.utils.data.TensorDataset(inputs[: options.images], torch.tensor(classes)[: options.images])
    loader = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, cpu=options.cpu)
    model = cifar_resnet(14)
    isolation = localgrad.isolate(model, num_blocks=3, objective=localgrad.dgl(10), example=inputs[:2])  # added
    isolation.backward = accelerator.backward  # added: divides by the number of micro-batches, scales under float16
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.05, momentum=0.9)  # was model.parameters()
    isolation.save_with(optimizer)  # added: accelerator.save_state() writes the auxiliary networks too
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for epoch in range(options.epochs):
        model.train()
        for batch, labels in loader:
            with accelerator.accumulate(model):
                isolation.targets = labels  # added
                loss = F.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"epoch {epoch + 1}: {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
