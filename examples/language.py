"""Train a character-level language model like nanoGPT's: end-to-end, checkpointed, or in gradient-isolated blocks.

    python examples/language.py --data path/to/shakespeare --out runs/e2e.json
    python examples/language.py --data any.txt --method local --layers 6 --blocks 3 --momentum man --out runs/man.json

The data are a text file (its last tenth is for validation), a folder with train.txt and validation.txt, or a data set
of texts on the Hugging Face hub, such as karpathy/tiny_shakespeare. The defaults are nanoGPT's small setting. The JSON
has the validation loss of the model and of every early exit, the seconds of the training steps, the peak of the
device's memory, and sampled text from the whole model and from the first exit.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import localgrad
from gpt import GPT, read, sample, validate
from task import MOMENTA, allocated, fit, flags, mixed, momentum_of, write


def isolated(model: GPT, options: argparse.Namespace, example: Tensor, vocabulary: int) -> Any:
    """Isolate the model in blocks with about equal numbers of layers."""
    cuts = [f"layers.{j * options.layers // options.blocks - 1}" for j in range(1, options.blocks)]
    if options.head == "readout":
        objective = localgrad.readout("head", "norm", depth=options.depth, shift=False)
    else:
        objective = localgrad.dense(vocabulary)
    return localgrad.isolate(model, cuts, objective=objective, momentum=momentum_of(options), example=example)


def early_exit(model: GPT, isolation: Any, options: argparse.Namespace, block: int) -> Callable[[Tensor], Tensor]:
    """A function from tokens to the scores of a block's own head."""
    depth = (block + 1) * options.layers // options.blocks
    momentum, objective = isolation.momenta[block], isolation.objectives[block]

    def score(tokens: Tensor) -> Tensor:
        features = model.features(tokens, depth)
        return objective.predict(features if momentum is None else momentum(features))

    return score


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    methods = ["e2e", "checkpointed", "local"]
    parser = flags(__doc__, methods, list(MOMENTA), "a text file, a folder, or a hub name")
    parser.add_argument("--blocks", type=int, default=3, help="K, for local")
    parser.add_argument("--head", choices=["private", "readout"], default="readout", help="of a local block")
    parser.add_argument("--depth", type=int, default=0, help="fresh layers before a readout")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="of the attention")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--evaluations", type=int, default=4, help="of the validation loss, evenly over the steps")
    options = parser.parse_args(arguments)
    if options.method == "local" and not 2 <= options.blocks <= options.layers:
        parser.error(f"--blocks is {options.blocks}: from 2 to the number of layers, {options.layers}")
    if options.depth and options.head != "readout":
        parser.error("--depth needs --head readout")
    return options


def optimiser(options: argparse.Namespace, parts: list[list[torch.nn.Parameter]]) -> tuple[Any, Any]:
    """nanoGPT's optimizer and schedule: AdamW, weight decay of matrices, warm-up, and a cosine down to a tenth."""
    decayed = [{"params": [p for part in parts for p in part if p.ndim >= 2], "weight_decay": 0.1}]
    rest = [{"params": [p for part in parts for p in part if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([*decayed, *rest], lr=options.lr, betas=(0.9, 0.99), fused="cuda" in options.device)
    warmup = min(100, options.steps // 10)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))
        return (step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.9 * cosine

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    train, validation = read(options.data)
    letters = sorted(set(train + validation))
    index = {letter: i for i, letter in enumerate(letters)}
    train, validation = (torch.tensor([index[c] for c in t], device=options.device) for t in (train, validation))
    held = allocated(options)
    model = GPT(len(letters), options.context, options.layers, options.heads, options.width, options.dropout)
    model.to(options.device)
    model.checkpointed = options.method == "checkpointed"
    draw = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.context + 1)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(train) - options.context, (options.batch_size, 1), generator=draw)
        rows = train[(starts + window).to(options.device)]
        return rows[:, :-1], rows[:, 1:]

    isolation = isolated(model, options, batch()[0], len(letters)) if options.method == "local" else None
    parts = [list(model.parameters())]
    if isolation is not None:
        parts = [isolation.trainable_parameters(block) for block in range(options.blocks)]

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        if isolation is not None:
            isolation.targets = targets
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    fitted = fit(
        options,
        model,
        *optimiser(options, parts),
        options.steps,
        batch,
        loss_of,
        clipped=parts,
        evaluate=lambda: validate(model, validation, options.context),
        evaluations=options.evaluations,
    )
    model.eval()
    exits, texts = [], {}
    with mixed(options):
        if isolation is not None:
            isolation.eval()
            scores = [early_exit(model, isolation, options, block) for block in range(options.blocks - 1)]
            exits = [validate(score, validation, options.context) for score in scores]
            texts["first exit"] = sample(scores[0], letters, options.context, options.device)
        texts["model"] = sample(model, letters, options.context, options.device)
    loss = fitted.curve[-1][1]
    found = {"validation_loss": loss, "perplexity": math.exp(loss), "exits": exits, "curve": fitted.curve}
    trained = [parameter for part in parts for parameter in part]
    result = write(options, "language", model, trained, fitted, held, **found, texts=texts)
    print(f"{options.out.stem}: validation loss {loss:.4f}, {fitted.seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
