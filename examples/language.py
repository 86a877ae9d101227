"""A character-level language model of nanoGPT's kind: end-to-end, checkpointed, or in gradient-isolated blocks.

    python examples/language.py --data path/to/shakespeare --out runs/e2e.json
    python examples/language.py --data any.txt --method local --layers 6 --blocks 3 --momentum man --out runs/man.json

The data are a text file (its last tenth validates), a folder with train.txt and validation.txt, or rows of text on the
Hugging Face hub, as karpathy/tiny_shakespeare. The defaults are nanoGPT's small setting. The JSON holds the validation
loss of the model and of every early exit, seconds of the training steps, the peak of the device's memory, and text from
the whole model and from the first exit.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import localgrad

MOMENTA: dict[str, dict[str, Any]] = {
    "none": {},
    "man": {},
    "ema": {"bias": False},
    "bias": {"ema": False},
    "residual": {"form": "residual"},
}
"""Settings of `localgrad.man`."""


class Layer(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02 * (scale if linear in (self.out, self.down) else 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(mixed), dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), dropout)


class GPT(nn.Module):
    """Tokens `(N, L)` to scores of the next token `(N, L, V)`; embedding and output layer are not tied."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        scale = (2 * layers) ** -0.5
        self.layers = nn.ModuleList(Layer(width, heads, dropout, scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in (self.tokens, self.positions, self.head):
            nn.init.normal_(module.weight, std=0.02)
        self.dropout, self.checkpointed = dropout, False

    def features(self, tokens: Tensor, depth: int | None = None) -> Tensor:
        """What the first `depth` layers, or all, make of the tokens."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.tokens(tokens) + self.positions(positions), self.dropout, self.training)
        for layer in self.layers[:depth]:
            keep = not (self.checkpointed and torch.is_grad_enabled())
            x = layer(x) if keep else checkpoint(layer, x, use_reentrant=False)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.features(tokens)))


def read(path: Path) -> tuple[str, str]:
    """Training and validation text."""
    if path.is_file():
        text = path.read_text()
    elif path.is_dir():
        return (path / "train.txt").read_text(), (path / "validation.txt").read_text()
    elif str(path).count("/") == 1:
        from datasets import load_dataset

        text = "\n".join(load_dataset(str(path), split="train")["text"])
    else:
        raise SystemExit(f"--data is {path}, where nothing is: give a text file, a folder, or a hub name OWNER/NAME")
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


@torch.no_grad()
def validate(score: Callable[[Tensor], Tensor], data: Tensor, context: int) -> float:
    """Mean loss over all of the data, in windows side by side."""
    windows = data[: (len(data) - 1) // context * context].view(-1, context)
    targets = data[1 : windows.numel() + 1].view(-1, context)
    total = torch.zeros((), device=data.device)
    for x, y in zip(windows.split(256), targets.split(256), strict=True):
        total += F.cross_entropy(score(x).flatten(0, 1).float(), y.flatten(), reduction="sum")
    return float(total) / targets.numel()


@torch.no_grad()
def sample(score: Callable[[Tensor], Tensor], letters: Sequence[str], context: int, device: str) -> str:
    """300 characters after a line break."""
    tokens = torch.full((1, 1), letters.index("\n") if "\n" in letters else 0, device=device)
    for _ in range(300):
        probabilities = score(tokens[:, -context:])[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return "".join(letters[i] for i in tokens[0, 1:].tolist())


def isolated(model: GPT, options: argparse.Namespace, example: Tensor, vocabulary: int) -> Any:
    """The model in blocks of about equally many layers."""
    cuts = [f"layers.{j * options.layers // options.blocks - 1}" for j in range(1, options.blocks)]
    if options.head == "readout":
        objective = localgrad.readout("head", "norm", depth=options.depth, shift=False)
    else:
        objective = localgrad.dense(vocabulary)
    momentum = None if options.momentum == "none" else localgrad.man(**MOMENTA[options.momentum])
    return localgrad.isolate(model, cuts, objective=objective, momentum=momentum, example=example)


def early_exit(model: GPT, isolation: Any, options: argparse.Namespace, block: int) -> Callable[[Tensor], Tensor]:
    """The scores of a block's own head."""
    depth = (block + 1) * options.layers // options.blocks
    momentum, objective = isolation.momenta[block], isolation.objectives[block]

    def score(tokens: Tensor) -> Tensor:
        features = model.features(tokens, depth)
        return objective.predict(features if momentum is None else momentum(features))

    return score


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file, a folder, or a hub name")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--method", choices=["e2e", "checkpointed", "local"], default="e2e")
    parser.add_argument("--blocks", type=int, default=3, help="K, for local")
    parser.add_argument("--head", choices=["private", "readout"], default="readout", help="of a local block")
    parser.add_argument("--depth", type=int, default=0, help="fresh layers before a readout")
    parser.add_argument("--momentum", choices=list(MOMENTA), default="none", help="between a block and its head")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="of the attention")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--evaluations", type=int, default=4, help="of the validation loss, evenly over the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.method == "local" and not 2 <= options.blocks <= options.layers:
        parser.error(f"--blocks is {options.blocks}: from 2 to the number of layers, {options.layers}")
    if options.depth and options.head != "readout":
        parser.error("--depth needs --head readout")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    train, validation = read(options.data)
    letters = sorted(set(train + validation))
    index = {letter: i for i, letter in enumerate(letters)}
    train, validation = (torch.tensor([index[c] for c in t], device=options.device) for t in (train, validation))
    held = torch.cuda.memory_allocated() if "cuda" in options.device else 0  # the text
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
    decayed = [{"params": [p for part in parts for p in part if p.ndim >= 2], "weight_decay": 0.1}]
    rest = [{"params": [p for part in parts for p in part if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([*decayed, *rest], lr=options.lr, betas=(0.9, 0.99), fused="cuda" in options.device)
    warmup = min(100, options.steps // 10)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))
        return (step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.9 * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    mixed = torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled="cuda" in options.device)
    curve, peak, seconds, began = [], None, 0.0, time.perf_counter()
    progress = tqdm(range(1, options.steps + 1), desc=options.out.stem, disable=None)
    for step in progress:
        tokens, targets = batch()
        with mixed:
            if isolation is not None:
                isolation.targets = targets
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == options.steps or step % max(1, options.steps // options.evaluations) == 0:
            train_loss = float(loss.detach())  # waits for the device
            if "cuda" in options.device and not curve:
                peak = torch.cuda.max_memory_allocated() - held
            seconds += time.perf_counter() - began
            model.eval()
            with mixed:
                curve.append((step, validate(model, validation, options.context)))
            model.train()
            progress.set_postfix(train=f"{train_loss:.3f}", validation=f"{curve[-1][1]:.3f}")
            began = time.perf_counter()
    model.eval()
    exits, texts = [], {}
    with mixed:
        if isolation is not None:
            isolation.eval()
            scores = [early_exit(model, isolation, options, block) for block in range(options.blocks - 1)]
            exits = [validate(score, validation, options.context) for score in scores]
            texts["first exit"] = sample(scores[0], letters, options.context, options.device)
        texts["model"] = sample(model, letters, options.context, options.device)
    result = {
        "task": "language",
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "validation_loss": curve[-1][1],
        "perplexity": math.exp(curve[-1][1]),
        "exits": exits,
        "curve": curve,
        "seconds": seconds,
        "peak_mib": None if peak is None else peak / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for part in parts for p in part),
        "texts": texts,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if "cuda" in options.device else "processor",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.out.stem}: validation loss {curve[-1][1]:.4f}, {seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
