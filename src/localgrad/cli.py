"""The command line: `localgrad COMMAND ...`, one function a command."""

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from localgrad.errors import LocalGradError

USAGE = """\
localgrad trains a network as gradient-isolated blocks, each with a local loss of its own.

  localgrad demo                       see it work in minutes, on images that need no download
  localgrad recipes [WORDS]            the named runs of the papers' tables
  localgrad train RECIPE [FLAGS]       train one of them
  localgrad evaluate RUN_FOLDER        test the weights that a run left
  localgrad reproduce [TABLE]          run all rows of a table, for any seeds, and compare with the paper
  localgrad analyse RUN_FOLDER         probes, CKA and pictures of what it learnt
  localgrad time RESULTS               seconds of a step of every row, measured in turns
  localgrad report RESULTS             all results on one page, beside the papers' values
  localgrad units MODEL                the units of a network, where it can be cut
  localgrad plan MODEL                 the memory that a step would take, and the best cuts

`localgrad COMMAND --help` says more. A first run, half a minute on a CPU:

  localgrad train digits-dgl-man --run-dir runs/first
"""

SHORT = {
    "--data": "--data.source",
    "--train-limit": "--data.train-limit",
    "--test-limit": "--data.test-limit",
    "--epochs": "--optim.epochs",
    "--warmup-epochs": "--optim.warmup-epochs",
    "--batch-size": "--optim.batch-size",
    "--lr": "--optim.lr",
}
"""Short names of flags, and what they stand for."""

TRAIN_HELP = """Train a recipe, or what a run folder's config says, with any field changed by a flag.

Examples:
  localgrad train digits-dgl-man --epochs 3 --run-dir runs/first
  localgrad train cifar10-resnet32-k16-dgl-man --data path/to/cifar10 --seed 1
  localgrad train cifar10-resnet32-k16-dgl-man --momentum.decay 0.99 --dry-run
  localgrad train runs/first --resume

Short names: """ + ", ".join(f"{short} for {full}" for short, full in SHORT.items())

EVALUATE_HELP = """Test the weights that a finished run left in its folder.

Examples:
  localgrad evaluate runs/first --local-heads
  localgrad evaluate runs/first --exit-at 3
"""

ANALYSE_HELP = """Look into the features of a finished run: linear probes, CKA with another run, pictures.

Without --probe, --cka or --pictures it does all of them, CKA where a second run is given. Writes JSON and PNG files.

Examples:
  localgrad analyse runs/first
  localgrad analyse runs/first runs/end-to-end --cka
  localgrad analyse runs/first --pictures --projection tsne --images 3 17 42
"""

TIME_HELP = """Measure how long a step takes of every training that has a finished run below a folder, in turns.

Runs that were made at different times, or beside others, cannot be compared by their seconds. Here the trainings take
turns, a step each, so that whatever else the machine does hits all alike. All networks are in memory at once. Writes
step-times.json into the folder. From there `localgrad report` takes the seconds of each table of which all rows are in
it, for runs of the same device (a processor's number of threads counts).

Examples:
  localgrad time results/first
  OMP_NUM_THREADS=1 localgrad time results/first --data path/to/cifar10 --rounds 30
"""

REPORT_HELP = """Write one page with all results below a folder: tables beside the papers' values, curves, pictures.

The page needs no network; what is damaged is named and left out.

Example:
  localgrad report results/ --output report.html
"""

DEMO_HELP = """Train one small ResNet on scikit-learn's digits end-to-end, with DGL, and with DGL+MAN, three seeds each.

Prints a table, and writes it (table.json) and the learning curves (curves.png). No download, under three minutes on
two cores.

Example:
  localgrad demo --run-dir runs/demo
  localgrad demo --seeds 0 --epochs 3
"""

UNITS_HELP = """List the units of a network: where it may be cut, and what each costs.

Examples:
  localgrad units cifar_resnet --depth 110
  localgrad units torchvision:resnet50 --image-size 128
  localgrad units timm:vit_tiny_patch16_224 --batch-size 64
"""

PLAN_HELP = """Predict the peak memory of a training step, and find the cuts that make it smallest. Needs no GPU.

Compares end-to-end training, with and without activation checkpointing, and local learning for several numbers of
blocks, with and without momentum.

Examples:
  localgrad plan torchvision:resnet101 --budget 8GiB
  localgrad plan cifar_resnet --depth 110 --batch-size 1024 --output runs/plan
"""

REPRODUCE_HELP = """Run the rows of a table, each for every seed, and print them beside the paper's values.

Without a table it lists them. What is done is not run again and what is half done goes on, after Ctrl-C too. The output
folder gets one ROW-seedN.json a run; the run folders are in its subfolder runs/.

Examples:
  localgrad reproduce
  localgrad reproduce digits --seeds 0 1 2 --jobs 2
  localgrad reproduce first --data path/to/cifar10 --epochs 10 --warmup-epochs 2 --output results/first-10
  localgrad reproduce first --rows cifar10-resnet32-k16-dgl --dry-run
"""

RECIPES_HELP = """List the named runs: blocks, cuts, and the test error that the paper reports.

Example:
  localgrad recipes cifar10 resnet32 man
"""


def train(arguments: Sequence[str]) -> int:
    """`localgrad train RECIPE [FLAGS]`."""
    import tyro

    from localgrad.config import TrainConfig, to_dict, validate
    from localgrad.devices import as_launched
    from localgrad.recipes import recipe
    from localgrad.runs import RunFolder

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: localgrad train RECIPE [FLAGS]\n\n{TRAIN_HELP}\n\nAll flags: localgrad train RECIPE --help")
        return 0
    name, *given_flags = arguments
    flags = list(map(_full, given_flags))
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

    options = _parse(Train, flags, f"localgrad train {name}", TRAIN_HELP)
    config = validate(as_launched(options.config))
    if options.dry_run:
        from localgrad.build import with_defaults

        print(json.dumps(to_dict(with_defaults(config)), indent=2))
        return 0
    run_dir = options.run_dir or (given if is_folder else Path("runs", f"{name}-seed{config.seed}"))
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from localgrad.trainer import fit

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


def evaluate(arguments: Sequence[str]) -> int:
    """`localgrad evaluate RUN_FOLDER`."""
    import tyro

    @dataclass(frozen=True)
    class Evaluate:
        run_folder: tyro.conf.Positional[Path]
        """Folder of a finished run."""
        data: str | None = None
        """Other images to test on, all of them: a hub name or a folder; those of the run unless given."""
        test_split: str | None = None
        """Split to test on; that of the run unless given."""
        local_heads: bool = False
        """Test each block's own head too."""
        exit_at: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Run only the first so many blocks and the last one's own head, and say what that saves."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""

    options = _parse(Evaluate, arguments, "localgrad evaluate", EVALUATE_HELP)
    from localgrad.evaluation import early_exit
    from localgrad.evaluation import evaluate as evaluate_run

    if options.exit_at is not None:
        if options.local_heads:
            raise LocalGradError("--exit-at tests one head, --local-heads all of them: give one of the two")
        left = early_exit(
            options.run_folder,
            options.exit_at,
            data=options.data,
            test_split=options.test_split,
            accelerator=options.accelerator,
        )
        print(
            f"test error {left.test_error:.2f}% on {left.images:,} images, after block {options.exit_at} of "
            f"{left.num_blocks}: {left.compute:.1%} of the network's compute, {left.parameters:.1%} of its parameters "
            "(the head counted in)"
        )
        return 0
    found = evaluate_run(
        options.run_folder,
        data=options.data,
        test_split=options.test_split,
        local_heads=options.local_heads,
        accelerator=options.accelerator,
    )
    print(f"test error {found.test_error:.2f}% on {found.images:,} images")
    for number, error in enumerate(found.local_errors or (), start=1):
        print(f"  block {number}: {'no class head' if error is None else f'{error:.2f}%'}")
    return 0


def analyse(arguments: Sequence[str]) -> int:
    """`localgrad analyse RUN [RUN2]`."""
    import tyro

    @dataclass(frozen=True)
    class Analyse:
        run_folder: tyro.conf.Positional[Path]
        """Folder of a finished run."""
        other_run: tyro.conf.Positional[Path | None] = None
        """Folder of another one, to compare with by CKA."""
        probe: bool = False
        """Train a linear probe on every unit: how far its features tell the classes apart."""
        cka: bool = False
        """Compare every unit with every unit of the other run."""
        pictures: bool = False
        """Draw activation maps of some images, and the features of many in two dimensions."""
        output: Path | None = None
        """Folder for the files; `analysis` in the run's folder unless given."""
        data: str | None = None
        """Other images: a hub name or a folder; those of the run unless given."""
        test_split: str | None = None
        """Split to test on; that of the run unless given."""
        train_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Train the probes on so many images only, evenly from each class."""
        test_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Use so many test images only, evenly from each class."""
        epochs: int = 10
        """Passes over the training images for the probes."""
        batch_size: int = 256
        """Images of a batch."""
        images: tuple[int, ...] = ()
        """Test images to draw activation maps of, by position from 0; one of each of four classes unless given."""
        points: int = 500
        """Test images to project."""
        projection: Literal["pca", "tsne"] = "pca"
        """How to project the features to two dimensions."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""

    options = _parse(Analyse, arguments, "localgrad analyse", ANALYSE_HELP)
    from localgrad.analysis.study import analyse_run

    for path in analyse_run(**vars(options)):
        print(f"wrote {path}")
    return 0


def time(arguments: Sequence[str]) -> int:
    """`localgrad time RESULTS`."""
    import tyro

    @dataclass(frozen=True)
    class Time:
        results: tyro.conf.Positional[Path]
        """Folder with results, in any subfolders."""
        data: str | None = None
        """Other images: a hub name or a folder; those of the runs unless given."""
        rounds: int = 15
        """Steps of each training that count."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""
        output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
        """The file; step-times.json in the folder of the results unless given."""

    options = _parse(Time, arguments, "localgrad time", TIME_HELP)
    path = options.output or options.results / "step-times.json"
    if path.is_dir() or (options.output is not None and not path.parent.is_dir()):  # before minutes of work
        raise LocalGradError(f"{path} cannot be a file: give --output with another name, in a folder that is there")
    from localgrad.runs import write_json
    from localgrad.timing import show_times, time_results

    found = time_results(
        options.results,
        data=options.data,
        rounds=options.rounds,
        accelerator=options.accelerator,
        warn=lambda text: print(f"localgrad: {text}", file=sys.stderr),
    )
    show_times(found)
    write_json(path, found)
    print(f"wrote {path}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """`localgrad report RESULTS`."""
    import tyro

    @dataclass(frozen=True)
    class Report:
        results: tyro.conf.Positional[Path]
        """Folder with results, in any subfolders."""
        output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
        """The page."""

    options = _parse(Report, arguments, "localgrad report", REPORT_HELP)
    from localgrad.report import write_report

    write_report(options.results, options.output, lambda text: print(f"localgrad: {text}", file=sys.stderr))
    print(f"wrote {options.output}")
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """`localgrad recipes [WORDS]`."""
    import tyro

    from localgrad.recipes import RECIPES

    @dataclass(frozen=True)
    class Recipes:
        words: tyro.conf.Positional[tuple[str, ...]] = ()
        """List only the recipes whose names have all of these words."""

    words = _parse(Recipes, arguments, "localgrad recipes", RECIPES_HELP).words
    names = [name for name in RECIPES if all(word in name for word in words)]
    if not names:
        raise LocalGradError(f"no recipe has {' and '.join(words)} in its name; `localgrad recipes` lists all of them")
    width = max(map(len, names))
    print(f"{'recipe':{width}}  {'label':>5}  blocks  cuts  paper's error")
    for name in names:
        row = RECIPES[name]()
        error = "-" if row.paper_error is None else f"{row.paper_error:.2f}%"
        print(f"{name:{width}}  {row.label:>5}  {row.num_blocks:6}  {row.num_blocks - 1:4}  {error:>13}")
    return 0


def reproduce(arguments: Sequence[str]) -> int:
    """`localgrad reproduce [TABLE]`."""
    import tyro

    number = tyro.conf.arg(metavar="INT")

    @dataclass(frozen=True)
    class Reproduce:
        table: tyro.conf.Positional[str] = ""
        """Name of the table; without one, the tables are listed."""
        seeds: tuple[int, ...] = (0,)
        """Seeds, one run each of every row."""
        rows: tuple[str, ...] = ()
        """Only these rows of the table, by their full names."""
        output: Path | None = None
        """Folder for results and runs; results/TABLE unless given."""
        jobs: int = 1
        """Runs at the same time; the processor's threads are divided between them, and GPUs given out in turn."""
        dry_run: bool = False
        """Print what would be run, and stop."""
        data: str | None = None
        """Hub name or folder of the images, instead of the recipes'."""
        train_limit: Annotated[int | None, number] = None
        """Train on so many images only, evenly from each class."""
        test_limit: Annotated[int | None, number] = None
        """Test on so many images only, evenly from each class."""
        test_split: str | None = None
        """Split to test on, instead of the recipes'."""
        epochs: Annotated[int | None, number] = None
        """Passes over the images, instead of the recipes'."""
        warmup_epochs: Annotated[int | None, number] = None
        """Epochs of warm-up, instead of the recipes'; a short run wants fewer."""
        batch_size: Annotated[int | None, number] = None
        """Images an optimizer step, instead of the recipes'."""
        lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
        """Learning rate at the top of the cosine, instead of the recipes'."""
        evaluate_every: Annotated[int | None, number] = None
        """Epochs between two evaluations, instead of every one."""
        checkpoint_every: Annotated[int | None, number] = None
        """Optimizer steps between two checkpoints, besides the one after each epoch."""
        local_heads: bool = False
        """Evaluate each block's own head too."""
        accelerator: str | None = None
        """Device: auto, cpu, cuda or mps."""
        precision: str | None = None
        """Precision: auto, 32-true or bf16-mixed."""

    options = _parse(Reproduce, arguments, "localgrad reproduce", REPRODUCE_HELP)
    from localgrad.recipes.tables import TABLES

    if not options.table:
        width = max(map(len, TABLES))
        print(f"{'table':{width}}  rows  what is compared")
        for name, listed in TABLES.items():
            print(f"{name:{width}}  {len(listed.rows):4}  {listed.title}")
        return 0
    from localgrad.reproduce import plan_cells, run_cells, show_table

    changes = {
        "data.source": options.data,
        "data.train_limit": options.train_limit,
        "data.test_limit": options.test_limit,
        "data.test_split": options.test_split,
        "optim.epochs": options.epochs,
        "optim.warmup_epochs": options.warmup_epochs,
        "optim.batch_size": options.batch_size,
        "optim.lr": options.lr,
        "evaluate_every": options.evaluate_every,
        "checkpoint_every": options.checkpoint_every,
        "local_heads": options.local_heads or None,
        "accelerator": options.accelerator,
        "precision": options.precision,
    }
    output = options.output or Path("results", options.table)
    given = {name: value for name, value in changes.items() if value is not None}
    cells = plan_cells(options.table, seeds=options.seeds, changes=given, output=output, rows=options.rows)
    if options.dry_run:
        for cell in cells:
            print(f"{cell.state:7}  localgrad {shlex.join(cell.command)}")
        return 0
    failures = run_cells(cells, jobs=options.jobs)
    show_table(options.table, output)
    for name, reason in failures.items():
        print(f"localgrad: {name} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def demo(arguments: Sequence[str]) -> int:
    """`localgrad demo`."""
    import tyro

    @dataclass(frozen=True)
    class Demo:
        run_dir: Path = Path("runs/demo")
        """Folder for the runs, the plot and the table; what is finished in it is not run again."""
        epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Passes over the images; the recipes' own unless given."""
        train_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Train on so many images only, evenly from each class."""
        seeds: tuple[int, ...] = (0, 1, 2)
        """Seeds, three runs each; a seed decides initial weights, order of the images and augmentation."""

    options = _parse(Demo, arguments, "localgrad demo", DEMO_HELP)
    from localgrad.demo import main as run

    try:
        run(options.run_dir, epochs=options.epochs, train_limit=options.train_limit, seeds=options.seeds)
    except KeyboardInterrupt as interruption:
        said = str(interruption) or "interrupted"
        print(f"localgrad: {said}; the same command goes on from there", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    return 0


def units(arguments: Sequence[str]) -> int:
    """`localgrad units MODEL`."""
    import tyro

    @dataclass(frozen=True)
    class Units:
        model: tyro.conf.Positional[str]
        """cifar_resnet, torchvision:NAME or timm:NAME."""
        image_size: int | None = None
        """Height and width of the images in pixels; 32 for cifar_resnet and 224 for others unless given."""
        batch_size: int = 128
        """Images of a batch, for the costs."""
        depth: int = 32
        """Layers of a cifar_resnet."""

    options = _parse(Units, arguments, "localgrad units", UNITS_HELP)
    from localgrad.inspection import inspect_model, show_units

    size = (32 if options.model == "cifar_resnet" else 224) if options.image_size is None else options.image_size
    found, costs = inspect_model(options.model, depth=options.depth, image_size=size, batch_size=options.batch_size)
    show_units(options.model, found, costs, options.batch_size)
    return 0


def plan(arguments: Sequence[str]) -> int:
    """`localgrad plan MODEL`."""
    import tyro

    @dataclass(frozen=True)
    class Plan:
        model: tyro.conf.Positional[str]
        """cifar_resnet, torchvision:NAME or timm:NAME."""
        batch_size: int = 128
        """Images of a batch."""
        image_size: int | None = None
        """Height and width of the images in pixels; 32 for cifar_resnet and 224 for others unless given."""
        num_classes: int | None = None
        """Number of classes; 10 for cifar_resnet and 1000 for others unless given."""
        depth: int = 32
        """Layers of a cifar_resnet."""
        objective: str = "dgl"
        """Local loss: classifier, predsim, dgl or infopro; above 96 px with the heads for wide features."""
        momentum: str = "man"
        """Momentum auxiliary network: none, man or manpp."""
        precision: str = "32-true"
        """32-true, or bf16-mixed for float32 weights and a forward pass under CUDA's bf16 autocast."""
        step_each_block: bool = False
        """Step each block right after its own backward pass, so that gradients of one block live at a time."""
        budget: str | None = None
        """Memory that a step may take, such as 8GiB."""
        num_blocks: tuple[int, ...] = ()
        """Numbers of blocks to try; 1, 2, 4, 8, ... unless given."""
        output: Path | None = None
        """Folder for plan.json and plan.png; nothing is written unless given."""

    options = _parse(Plan, arguments, "localgrad plan", PLAN_HELP)
    from localgrad.sheet import head_for, parse_bytes, plan_model, show_sheets, write_sheets

    small = options.model == "cifar_resnet"
    size = (32 if small else 224) if options.image_size is None else options.image_size
    budget = None if options.budget is None else parse_bytes(options.budget)
    sheets = plan_model(
        options.model,
        depth=options.depth,
        num_classes=(10 if small else 1000) if options.num_classes is None else options.num_classes,
        batch_size=options.batch_size,
        image_size=size,
        objective=options.objective,
        momentum=options.momentum,
        budget=budget,
        num_blocks=options.num_blocks or None,
        precision=options.precision,
        step_each_block=options.step_each_block,
    )
    name = f"cifar_resnet {options.depth}" if small else options.model
    precision = "float32" if options.precision == "32-true" else options.precision
    head = head_for(options.objective, size)
    loss = options.objective if head is None else f"{options.objective} with head {head}"
    title = f"{name}, batch {options.batch_size}, {size} px, {precision}, SGD, {loss}"
    title += ", each block stepped at once" if options.step_each_block else ""
    show_sheets(title, sheets, budget)
    if options.output is not None:
        write_sheets(options.output, title, sheets, budget)
        print(f"wrote {options.output / 'plan.json'} and {options.output / 'plan.png'}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "analyse": analyse,
    "time": time,
    "report": report,
    "units": units,
    "plan": plan,
}


def _parse(kind: Any, arguments: Sequence[str], program: str, text: str) -> Any:
    """Parses flags into a dataclass."""
    import tyro

    return tyro.cli(kind, args=list(arguments), prog=program, description=text)


def _full(argument: str) -> str:
    """A flag of `train` by its full name; an underscore in it is a hyphen."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return SHORT.get(name, name) + equals + value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where runs of `reproduce` failed, 2 for input that cannot be used (one line on stderr), 130
        when interrupted by Ctrl-C, 143 by SIGTERM, 141 where the reader of the output has gone.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot print ± gets a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if given[0] == "--version":
        from localgrad import __version__

        print(f"localgrad {__version__}")
        return 0
    try:
        if given[0] not in COMMANDS:
            from localgrad.config import closest

            raise LocalGradError(
                f"there is no command {given[0]!r}{closest(given[0], list(COMMANDS))}; "
                f"commands are {', '.join(COMMANDS)}"
            )
        return COMMANDS[given[0]](given[1:])
    except LocalGradError as error:
        print(f"localgrad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"localgrad: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
