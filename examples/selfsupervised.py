"""Barlow Twins on CIFAR-10 without labels, end-to-end or with a local loss for each stage; then linear probes.

    python examples/selfsupervised.py --data path/to/cifar10 --out runs/e2e.json
    python examples/selfsupervised.py --data path/to/cifar10 --method local --momentum man --out runs/man.json

The network is a ResNet-18. The data are a folder of parquet files (an image column and label), or an .npz with
train_images (N, 32, 32, 3), train_labels, test_images and test_labels. `--noise` is the noise in the code of Blockwise
SSL: Gaussian noise with this fraction of the features' standard deviation, added to the features that each stage gives
to its head and to the next stage. The JSON has the test accuracy of a linear layer on the pooled features of each
stage, the seconds of the training steps and the peak of the device's memory.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import localgrad
from task import allocated, fit, flags, mixed, momentum_of, write
from views import STAGES, Encoder, Order, pooled, probe, read, view


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    momenta = ["none", "man", "ema", "bias"]
    parser = flags(__doc__, ["e2e", "local"], momenta, "a folder of parquet files, or an .npz")
    parser.add_argument("--noise", type=float, default=0.0, help="0.25 in the released code")
    parser.add_argument("--projector", type=int, nargs="+", default=[1024, 1024, 1024], help="widths of the head")
    parser.add_argument("--batch-size", type=int, default=256, help="images; each has two views")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--probe-epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=None, help="train on the first so many alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    images, labels = (part.to(options.device) for part in read(options.data, "train", options.images))
    held = allocated(options)
    model = Encoder(options.noise).to(options.device, memory_format=torch.channels_last)
    batch_size = min(options.batch_size, len(images))
    order = Order(len(images), batch_size, options.seed)

    def batch() -> tuple[Tensor]:
        rows = order.next().to(options.device)
        return (torch.cat([view(images[rows]), view(images[rows])]).to(memory_format=torch.channels_last),)

    example = view(images[:2])
    twins = localgrad.barlow(options.projector[0], options.projector[1:])
    # there is no cut after the last stage, so its objective is built here
    last = twins(localgrad.Site(model.eval()(example).shape, 1, example.shape, index=3, num_blocks=4))
    last.to(options.device)
    model.train()
    parameters = list(model.parameters())
    if options.method == "local":
        isolation = localgrad.isolate(
            model, STAGES[:-1], objective=twins, momentum=momentum_of(options), example=example
        )
        parameters = isolation.trainable_parameters()
    parameters = [*parameters, *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=1e-4, fused="cuda" in options.device)
    steps = options.epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.1)
    fitted = fit(options, model, optimizer, schedule, steps, batch, lambda views: last(model(views)))
    model.eval()
    test_images, truth = (part.to(options.device) for part in read(options.data, "test"))
    with mixed(options):
        train_features, test_features = pooled(model, images), pooled(model, test_images)
    sets = zip(train_features, test_features, strict=True)
    accuracies = [probe(train, labels, test, truth, options.probe_epochs) for train, test in sets]
    found = {"probe_accuracy": accuracies[-1], "probe_accuracies": accuracies, "train_images": len(images)}
    result = write(options, "selfsupervised", model, parameters, fitted, held, **found, loss=fitted.loss)
    print(f"{options.out.stem}: probe {accuracies[-1]:.2f} %, {fitted.seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
