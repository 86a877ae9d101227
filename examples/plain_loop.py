"""A plain PyTorch loop in gradient-isolated blocks: what `localgrad.isolate` adds is marked.

    python examples/plain_loop.py
    python examples/plain_loop.py --epochs 20 --blocks 4 --momentum

A CIFAR-type ResNet on scikit-learn's digits (1,797 images of 8 x 8), trained on the first 1,500.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import localgrad
from localgrad.models import cifar_resnet


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print the losses of each epoch, and return the share of test images that are recognised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="how many are trained on")
    parser.add_argument("--momentum", action="store_true", help="momentum auxiliary networks (MAN)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    targets = torch.tensor(classes)
    train = torch.utils.data.TensorDataset(inputs[: options.images], targets[: options.images])
    loader = torch.utils.data.DataLoader(train, batch_size=100, shuffle=True)

    model = cifar_resnet(14)
    isolation = localgrad.isolate(  # added
        model,
        num_blocks=options.blocks,
        objective=localgrad.dgl(num_classes=10),
        momentum=localgrad.man() if options.momentum else None,
        example=inputs[:2],
    )
    print(isolation)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.05, momentum=0.9)  # changed
    for epoch in range(options.epochs):
        model.train()
        for batch, labels in loader:
            isolation.targets = labels  # added
            loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses = [*isolation.losses, loss.detach()]
        print(f"epoch {epoch + 1}: " + ", ".join(f"{each:.3f}" for each in losses))
    model.eval()
    with torch.no_grad():
        found = model(inputs[1500:]).argmax(1)
    accuracy = (found == targets[1500:]).float().mean().item()
    print(f"{accuracy:.1%} of the test images are recognised")
    return accuracy


if __name__ == "__main__":
    main()
