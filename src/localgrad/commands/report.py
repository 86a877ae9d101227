"""TODO commands.report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import parse

REPORT_HELP = """Write one page with all results below a folder: tables beside the papers' values, curves, pictures.

The page needs no network; what is damaged is named and left out.

Example:
  localgrad report results/ --output report.html
"""


def report(arguments: Sequence[str]) -> int:
    """`localgrad report RESULTS`."""
    import tyro

    @dataclass(frozen=True)
    class Report:
        results: tyro.conf.Positional[Path]
        """Folder with results, in any subfolders."""
        output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
        """The page."""

    options = parse(Report, arguments, "localgrad report", REPORT_HELP)
    from localgrad.results.report import write_report

    write_report(options.results, options.output, lambda text: print(f"localgrad: {text}", file=sys.stderr))
    print(f"wrote {options.output}")
    return 0
