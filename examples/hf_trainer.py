"""Hugging Face's Trainer, training in gradient-isolated blocks.

    python examples/hf_trainer.py --folder runs/gpt2
    python examples/hf_trainer.py --folder runs/gpt2 --steps 200 --accumulate 2
    python examples/hf_trainer.py --folder runs/gpt2 --steps 400 --resume

The lines that `localgrad` adds are marked. The model is a small GPT-2 with random initial weights, trained on the bytes
of a text. The optimizer state in each checkpoint contains the auxiliary networks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import localgrad  # added


def main(arguments: Sequence[str] | None = None) -> transformers.Trainer:
    """Train, or resume from the last checkpoint, and return the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file; by default this script")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    transformers.set_seed(0)
    text = torch.tensor(list(options.text.read_bytes()))
    rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 64 * 64].view(-1, 64)]
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": 2, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, **sizes)
    )

    objective, example = localgrad.readout("lm_head", norm="transformer.ln_f"), {"input_ids": text[None, :64]}  # added
    isolation = localgrad.isolate(model, num_blocks=2, objective=objective, targets="labels", example=example)  # added
    isolation.backward = lambda loss: trainer.accelerator.backward(loss / options.accumulate)  # added
    optimizer = isolation.save_with(torch.optim.AdamW(isolation.trainable_parameters(), 1e-3))  # added
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(options.folder),
            max_steps=options.steps,
            save_steps=options.save_steps,
            gradient_accumulation_steps=options.accumulate,
            use_cpu=options.cpu,
            report_to=[],
        ),
        train_dataset=rows,
        optimizers=(optimizer, None),  # added
    )
    last = get_last_checkpoint(str(options.folder)) if options.resume else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


if __name__ == "__main__":
    main()
