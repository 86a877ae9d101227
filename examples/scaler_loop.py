"""A loop with mixed precision and a GradScaler, trained in gradient-isolated blocks.

    python examples/scaler_loop.py

The lines that `localgrad` adds or changes are marked. In float16 all losses must be scaled, including the local losses.
The model is a CIFAR-type ResNet, trained on the first 1,500 of scikit-learn's digits (1,797 images of 8 x 8).
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import localgrad  # added
from localgrad.models import cifar_resnet


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; print the last loss of each epoch, and return that of the last epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="number of training images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    train = torch.utils.data.TensorDataset(inputs[: options.images], torch.tensor(classes)[: options.images])
    loader = torch.utils.data.DataLoader(train, batch_size=100, shuffle=True)

    model = cifar_resnet(14).to(options.device)
    example = inputs[:2].to(options.device)
    isolation = localgrad.isolate(model, num_blocks=3, objective=localgrad.dgl(10), example=example)  # added
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.05, momentum=0.9)  # was model.parameters()
    scaler = torch.amp.GradScaler(options.device)
    isolation.backward = lambda loss: scaler.scale(loss).backward()  # added
    loss = torch.zeros(())
    for epoch in range(options.epochs):
        for batch, labels in loader:
            batch, labels = batch.to(options.device), labels.to(options.device)
            isolation.targets = labels  # added
            with torch.autocast(options.device, torch.float16):
                loss = F.cross_entropy(model(batch), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
