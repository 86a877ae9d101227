"""The config of a run: dataclasses, their checks, and the model, blocks and optimizers built from them."""
