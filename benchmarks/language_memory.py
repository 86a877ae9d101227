"""Count the peak memory of a training step of GPT-2 medium on `meta`: end-to-end, checkpointed, and in local blocks.

    python benchmarks/language_memory.py -o results/language_memory.json
    python benchmarks/language_memory.py --dropout 0.1 -o results/language_memory-dropout.json

The model is the standard GPT-2 of transformers, with eight texts of 1,024 tokens in float32. Its attention is "sdpa",
which on `meta` materialises the attention matrices and their softmax. On `meta`, dropout saves its mask in the type of
its input; on a GPU the mask has one byte an element. The peak covers forward and backward pass and all
gradients, without weights and optimizer state. Local blocks use the model's own output layer (`readout`). The file has
the peak of the step, the largest peak of a local block, and the peak of the last block. In rows that step by block, the
gradients of each block are freed before the next block starts, as with an optimizer that steps in `isolate(...,
backward=)`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import localgrad
from localgrad.planning.measure import PeakMemory
from report import environment, print_table, write

GIB = 2**30
META = torch.device("meta")


def gpt2(size: str, dropout: float = 0.0) -> Any:
    """A GPT-2 on the `meta` device."""
    width, layers, heads = {"medium": (1024, 24, 16), "tiny": (64, 4, 2)}[size]
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    config.tie_word_embeddings = False
    config.use_cache = False
    with META:
        return transformers.GPT2LMHeadModel(config).train()


def peaks(
    model: Any, tokens: Tensor, blocks: int, *, checkpointed: bool = False, stepped: bool = False, **options: Any
) -> list[int]:
    """The peak of each block of a step in bytes; without blocks, the peak of the whole step.

    Args:
        model: the GPT-2.
        tokens: token ids `(N, L)`.
        blocks: number of blocks; 1 is end-to-end.
        checkpointed: use activation checkpointing of every layer.
        stepped: each block's optimizer steps after the block's own backward pass, so that its gradients are freed.
        options: further arguments of `isolate`.
    """
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counter = PeakMemory()
    found: list[int] = []

    def back_propagate(loss: Tensor) -> None:
        loss.backward()
        found.append(counter.peak)
        for parameter in isolation.trainable_parameters(len(found) - 1) if isolation and stepped else ():
            parameter.grad = None
        counter.peak = counter.current

    length = tokens.shape[1]
    # without a mask transformers reads values of tensors, which `meta` tensors lack
    mask = torch.ones(len(tokens), 1, length, length, dtype=torch.bool, device=META)
    layers = len(model.transformer.h)
    isolation: Any = None
    cuts = [f"transformer.h.{j * layers // blocks - 1}" for j in range(1, blocks)]
    if cuts:
        objective = localgrad.readout("lm_head", "transformer.ln_f")
        isolation = localgrad.isolate(
            model,
            cuts,
            objective=objective,
            example={"input_ids": tokens, "attention_mask": mask, "labels": tokens},
            targets="labels",
            backward=back_propagate,
            **options,
        )
    with counter:
        back_propagate(model(input_ids=tokens, attention_mask=mask, labels=tokens).loss)
    if isolation is not None:
        isolation.remove()
    model.zero_grad(set_to_none=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["medium", "tiny"], default="medium")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention, residual paths and embedding")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/language_memory.json"))
    options = parser.parse_args(arguments)
    tokens = torch.zeros(options.batch_size, options.length, dtype=torch.long, device=META)
    layers = len(gpt2(options.size).transformer.h)
    choices_of: list[tuple[str, int, dict[str, Any]]] = [
        ("end-to-end", 1, {}),
        ("checkpointed", 1, {"checkpointed": True}),
        ("local", 4, {}),
        ("local", layers, {}),
        ("local, MAN", 4, {"momentum": localgrad.man()}),
        ("local, MAN", layers, {"momentum": localgrad.man()}),
        ("local, recompute", 4, {"recompute": True}),
        ("local, recompute", layers, {"recompute": True}),
        ("local, recompute, steps by block", 4, {"recompute": True, "stepped": True}),
        ("local, recompute, steps by block", layers, {"recompute": True, "stepped": True}),
        ("local, MAN, recompute", layers, {"recompute": True, "momentum": localgrad.man(recompute=True)}),
        (
            "local, MAN, recompute, steps by block",
            layers,
            {"recompute": True, "momentum": localgrad.man(recompute=True), "stepped": True},
        ),
    ]
    rows = []
    for name, blocks, choices in choices_of:
        found = peaks(gpt2(options.size, options.dropout), tokens, blocks, **choices)
        rows.append(
            {
                "row": name,
                "blocks": blocks,
                "peak_gib": round(max(found) / GIB, 3),
                "largest_local_gib": round(max(found[:-1]) / GIB, 3) if found[:-1] else None,
                "last_gib": round(found[-1] / GIB, 3),
            }
        )
    print_table(f"GPT-2 {options.size}, {options.batch_size} x {options.length} tokens", rows)
    write(
        options.output,
        {
            "environment": environment(),
            "settings": {
                "size": options.size,
                "batch_size": options.batch_size,
                "length": options.length,
                "dropout": options.dropout,
            },
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
