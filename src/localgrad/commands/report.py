"""Write all results below a folder as one HTML page: tables beside the papers' values, curves, pictures.

The page needs no network. Damaged files are named and left out.

Example:
  localgrad report results/ --output report.html
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from localgrad.commands.parse import call, loading, tell
from localgrad.runs.files import check_writable


def report(
    results: tyro.conf.Positional[Path],
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
) -> int:
    """Write the page.

    Args:
        results: Folder with results, in any subfolders.
        output: Path of the page.
    """
    check_writable(output)
    with loading():
        from localgrad.results.report import write_report

    write_report(results, output, tell)
    print(f"wrote {output}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad report RESULTS`."""
    return call(report, arguments, "localgrad report", __doc__)
