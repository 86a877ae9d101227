"""A character-level GPT like nanoGPT's, with functions that read text, compute the validation loss and sample text."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    """Causal self-attention and an MLP, each with a LayerNorm before it and a residual connection."""

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
    """Tokens `(N, L)` to scores (logits) of the next token `(N, L, V)`. Embedding and output layer are not tied."""

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
        """Features after the first `depth` layers, or after all layers if None."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.tokens(tokens) + self.positions(positions), self.dropout, self.training)
        for layer in self.layers[:depth]:
            keep = not (self.checkpointed and torch.is_grad_enabled())
            x = layer(x) if keep else checkpoint(layer, x, use_reentrant=False)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.features(tokens)))


def read(path: Path) -> tuple[str, str]:
    """Read the training and the validation text."""
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
    """Mean loss over the data, in adjacent windows that do not overlap."""
    windows = data[: (len(data) - 1) // context * context].view(-1, context)
    targets = data[1 : windows.numel() + 1].view(-1, context)
    total = torch.zeros((), device=data.device)
    for x, y in zip(windows.split(256), targets.split(256), strict=True):
        total += F.cross_entropy(score(x).flatten(0, 1).float(), y.flatten(), reduction="sum")
    return float(total) / targets.numel()


@torch.no_grad()
def sample(score: Callable[[Tensor], Tensor], letters: Sequence[str], context: int, device: str) -> str:
    """Sample 300 characters, starting after a line break."""
    tokens = torch.full((1, 1), letters.index("\n") if "\n" in letters else 0, device=device)
    for _ in range(300):
        probabilities = score(tokens[:, -context:])[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return "".join(letters[i] for i in tokens[0, 1:].tolist())
