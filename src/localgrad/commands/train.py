"""Train a recipe, or the config of a run folder. Flags change any field of the config.

With --data FOLDER and no recipe, it trains on your own images: a ResNet-18 in four blocks, with DGL and MAN.

Examples:
  localgrad train digits-dgl-man --epochs 3 --run-dir runs/first
  localgrad train --data path/to/photographs --epochs 10
  localgrad train cifar10-resnet32-k16-dgl-man --data path/to/cifar10 --seed 1
  localgrad train cifar10-resnet32-k16-dgl-man --momentum.decay 0.99 --dry-run
  localgrad train runs/first --resume
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from localgrad.commands.parse import SHORT, call, full_flag, loading
from localgrad.config.schema import TrainConfig
from localgrad.data.sources import check_source
from localgrad.errors import LocalGradError
from localgrad.recipes.images import OWN, own_images
from localgrad.runs.files import check_writable

HELP = f"{(__doc__ or '').strip()}\n\nShort names: " + ", ".join(f"{short} for {full}" for short, full in SHORT.items())


def main(arguments: Sequence[str]) -> int:
    """`localgrad train RECIPE [FLAGS]`; a run folder can replace the recipe, or `--data FOLDER` stand alone."""
    given = list(map(full_flag, arguments)) or ["--help"]
    named = not given[0].startswith("-")
    name, flags = (arguments[0], given[1:]) if named else (OWN, given)
    if name == OWN and not any(flag.partition("=")[0] in ("--data.source", "-h", "--help") for flag in flags):
        raise LocalGradError(
            f"train takes the recipe first, as `localgrad train digits-dgl-man {shlex.join(arguments[named:])}`; or "
            "your own images, as `localgrad train --data FOLDER`"
        )
    folder = Path(name)
    is_folder = (folder / "config.json").exists()
    default = _default(name, folder if is_folder else None)
    default = _with_own_cuts(default, {flag.partition("=")[0] for flag in flags})
    return call(_command(name, default, folder if is_folder else None), flags, f"localgrad train {name}", HELP)


def _default(name: str, folder: Path | None) -> TrainConfig:
    from localgrad.recipes import recipe

    if folder is not None:
        with loading(more=True):
            from localgrad.runs.folder import RunFolder

        return RunFolder(folder).config()
    return own_images() if name == OWN else recipe(name).config


def _with_own_cuts(default: TrainConfig, flags: set[str]) -> TrainConfig:
    """The config without its cuts if a flag gives a number of blocks, or another network, which has other units.

    Another network is cut into as many blocks as the config has.
    """
    if default.cuts is None or "--cuts" in flags or not flags & {"--num-blocks", "--model.name"}:
        return default
    return replace(default, cuts=None, num_blocks=len(default.cuts) + 1)


def _command(name: str, default: TrainConfig, folder: Path | None) -> Callable[..., int]:
    """The command whose flags are the fields of a config, with the recipe's or folder's values as defaults."""

    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        run_dir: Path | None = None,
        resume: bool = False,
        dry_run: bool = False,
        quiet: bool = False,
    ) -> int:
        """Train the network.

        Args:
            config: The complete config of the run.
            run_dir: Folder for the files of the run; by default runs/RECIPE-seedSEED.
            resume: Continue the unfinished run in that folder.
            dry_run: Print the complete config as JSON and stop.
            quiet: Print only the result.
        """
        called = _called(config) if name == OWN else name
        return _train(
            replace(config, name=called) if name == OWN else config,
            run_dir or folder or Path("runs", f"{called}-seed{config.seed}"),
            resume=resume,
            dry_run=dry_run,
            quiet=quiet,
        )

    return train


def _called(config: TrainConfig) -> str:
    """Name of a run on your own images: the name of their folder with a prefix."""
    return f"{OWN}-{config.data.name or Path(config.data.source).expanduser().absolute().name}"


def _train(config: TrainConfig, run_dir: Path, *, resume: bool, dry_run: bool, quiet: bool) -> int:
    if not dry_run:
        check_source(config.data)  # before slow work
        check_writable(run_dir, "--run-dir")
    with loading(quiet, more=not dry_run):
        from localgrad.config.checks import validate
        from localgrad.config.methods import with_defaults
        from localgrad.config.saved import to_dict
        from localgrad.training.devices import as_launched

    config = validate(as_launched(config))
    if dry_run:
        print(json.dumps(to_dict(with_defaults(config)), indent=2))
        return 0
    with loading(quiet):
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        from localgrad.training.trainer import fit

    try:
        result = fit(config, run_dir, resume=resume, quiet=quiet)
    except KeyboardInterrupt as interruption:
        started = (run_dir / "config.json").exists()
        how = f"; continue with `localgrad train {shlex.quote(str(run_dir))} --resume`" if started else ""
        rank_zero_only(print)(f"localgrad: {str(interruption) or 'interrupted'}{how}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    chosen = f", chosen on the {result.chosen_on} images" if config.keep_best or config.patience else ""
    peak = "" if result.peak_memory_bytes is None else f", {result.peak_memory_bytes / 2**20:.0f} MiB a step"
    rank_zero_only(print)(
        f"test error {result.test_error:.2f}% "
        f"(best {result.best_test_error:.2f}% at epoch {result.best_epoch}{chosen}), "
        f"{result.wall_seconds:.0f} s{peak}; see {run_dir}"
    )
    return 0
