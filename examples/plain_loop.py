"""A plain PyTorch loop, trained in gradient-isolated blocks.

    python examples/plain_loop.py
    python examples/plain_loop.py --epochs 20

The lines that `localgrad` adds or changes are marked. The model is a CIFAR-type ResNet, trained on the first 1,500 of
scikit-learn's digits (1,797 images of 8 x 8) and tested on the others.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import localgrad  # added
from localgrad.models import cifar_resnet


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; print the last loss of each epoch, and return the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="number of training images")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    targets = torch.tensor(classes)
    train = torch.utils.data.TensorDataset(inputs[: options.images], targets[: options.images])
    loader = torch.utils.data.DataLoader(train, batch_size=100, shuffle=True)

    model = cifar_resnet(14)
    isolation = localgrad.isolate(model, num_blocks=3, objective=localgrad.dgl(10), example=inputs[:2])  # added
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.05, momentum=0.9)  # was model.parameters()
    for epoch in range(options.epochs):
        model.train()
        for batch, labels in loader:
            isolation.targets = labels  # added
            loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        found = model(inputs[1500:]).argmax(1)
    accuracy = (found == targets[1500:]).float().mean().item()
    print(f"{accuracy:.1%} of the test images are recognised")
    return accuracy


if __name__ == "__main__":
    main()
