"""A loop with DistributedDataParallel, trained in gradient-isolated blocks.

    torchrun --nproc-per-node 2 examples/ddp_loop.py

The lines that `localgrad` adds or changes are marked. The model is isolated first, then wrapped. It is a CIFAR-type
ResNet, trained on the first 1,500 of scikit-learn's digits (1,797 images of 8 x 8).
"""

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import localgrad  # added
from localgrad.models import cifar_resnet


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; print the first rank's last loss of each epoch, and return that of the last epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1500, help="number of training images")
    options = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    train = TensorDataset(inputs[: options.images], torch.tensor(classes)[: options.images])
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=100 // dist.get_world_size(), sampler=sampler)

    model = cifar_resnet(14)
    isolation = localgrad.isolate(model, num_blocks=3, objective=localgrad.dgl(10), example=inputs[:2])  # added
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.05, momentum=0.9)  # was model.parameters()
    loss = torch.zeros(())
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for batch, labels in loader:
            isolation.targets = labels  # added
            loss = F.cross_entropy(wrapped(batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: {loss.item():.3f} on {dist.get_world_size()} ranks")
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
