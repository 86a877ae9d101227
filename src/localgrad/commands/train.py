"""TODO commands.train."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import SHORT, full_flag, parse
from localgrad.errors import LocalGradError

TRAIN_HELP = """Train a recipe, or what a run folder's config says, with any field changed by a flag.

Examples:
  localgrad train digits-dgl-man --epochs 3 --run-dir runs/first
  localgrad train cifar10-resnet32-k16-dgl-man --data path/to/cifar10 --seed 1
  localgrad train cifar10-resnet32-k16-dgl-man --momentum.decay 0.99 --dry-run
  localgrad train runs/first --resume

Short names: """ + ", ".join(f"{short} for {full}" for short, full in SHORT.items())


def train(arguments: Sequence[str]) -> int:
    """`localgrad train RECIPE [FLAGS]`."""
    import tyro

    from localgrad.config.checks import validate
    from localgrad.config.saved import to_dict
    from localgrad.config.schema import TrainConfig
    from localgrad.recipes import recipe
    from localgrad.runs.folder import RunFolder
    from localgrad.training.devices import as_launched

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: localgrad train RECIPE [FLAGS]\n\n{TRAIN_HELP}\n\nAll flags: localgrad train RECIPE --help")
        return 0
    name, *given_flags = arguments
    flags = list(map(full_flag, given_flags))
    if name.startswith("-"):
        raise LocalGradError(f"train takes the recipe first, as `localgrad train digits-dgl-man {name}`")
    given = Path(name)
    is_folder = (given / "config.json").exists()
    default = RunFolder(given).config() if is_folder else recipe(name).config
    if any(flag.partition("=")[0] == "--num-blocks" for flag in flags) and "--cuts" not in flags:
        default = replace(default, cuts=None)  # a number of blocks stands instead of the recipe's cuts

    @dataclass(frozen=True)
    class Train:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: default)
        run_dir: Path | None = None
        """Folder for the run's files; runs/RECIPE-seedSEED unless given."""
        resume: bool = False
        """Continue the unfinished run of that folder."""
        dry_run: bool = False
        """Print the complete config as JSON and stop."""
        quiet: bool = False
        """Print the result only."""

    options = parse(Train, flags, f"localgrad train {name}", TRAIN_HELP)
    config = validate(as_launched(options.config))
    if options.dry_run:
        from localgrad.config.methods import with_defaults

        print(json.dumps(to_dict(with_defaults(config)), indent=2))
        return 0
    run_dir = options.run_dir or (given if is_folder else Path("runs", f"{name}-seed{config.seed}"))
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from localgrad.training.trainer import fit

    try:
        result = fit(config, run_dir, resume=options.resume, quiet=options.quiet)
    except KeyboardInterrupt as interruption:
        started = (run_dir / "config.json").exists()
        how = f"; continue with `localgrad train {run_dir} --resume`" if started else ""
        rank_zero_only(print)(f"localgrad: {str(interruption) or 'interrupted'}{how}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    rank_zero_only(print)(
        f"test error {result.test_error:.2f}% (best {result.best_test_error:.2f}% at epoch {result.best_epoch}), "
        f"{result.wall_seconds:.0f} s, {result.peak_memory_bytes / 2**20:.0f} MiB a step; see {run_dir}"
    )
    return 0
