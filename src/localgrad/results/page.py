"""Elements of the report's page as plain data for its template: tables, pictures and folded sections."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from localgrad.results.figures import Drawn, as_svg


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str = ""
    strong: str = ""
    """Text before `text`, in bold."""
    small: tuple[str, ...] = ()
    """Lines below, in small print."""
    link: str = ""
    """Id of the element that the text links to."""
    id: str = ""
    code: bool = False
    """Whether the text is a command."""


@dataclass(frozen=True)
class Grid:
    """A table whose first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: str = ""
    """If given, the table is folded, with this line as its summary."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    svg: Markup
    caption: str
    """Description, also for screen readers."""
    files: Sequence[str]
    """The files that it was drawn from."""


@dataclass(frozen=True)
class Part:
    """A heading with tables and pictures below."""

    title: str
    text: str = ""
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()

    def __bool__(self) -> bool:
        return bool(self.grids or self.pictures)


@dataclass(frozen=True)
class Detail:
    """A folded section of the page."""

    id: str
    title: str
    text: str
    parts: Sequence[Part]


class Studio:
    """Makes the pictures of a page, each with unique ids, and names files relative to the folder of results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)

    def name(self, path: Path) -> str:
        """The path of a file, relative to the folder."""
        return str(path.relative_to(self._folder))

    def picture(self, drawn: Drawn | Figure, caption: str, files: Iterable[Path]) -> Picture:
        """A picture with its caption, extended by the remarks of the figure."""
        figure, remarks = (drawn.figure, drawn.remarks) if isinstance(drawn, Drawn) else (drawn, ())
        text = " ".join([caption, *remarks])
        svg = Markup(as_svg(figure, f"p{next(self._numbers)}", text))
        return Picture(svg, text, [self.name(path) for path in files])


def plain(*texts: str) -> list[Cell]:
    """Cells of plain text."""
    return [Cell(text) for text in texts]
