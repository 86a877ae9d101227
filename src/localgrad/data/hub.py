"""Whether the Hugging Face hub has something now: asked once, with one limit, before anything is loaded from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Literal

HUB_SECONDS = 5.0
UNREACHABLE = "the Hugging Face hub cannot be reached: give {instead}, or connect and try again"
ABSENT = "the hub has no such {kind}, or it is private: give {instead}, or sign in with `hf auth login`"
OFFLINE = "HF_HUB_OFFLINE is set: give {instead}, or unset it"


def hub_lacks(
    name: str,
    kind: Literal["dataset", "model"] = "dataset",
    instead: str = "--data FOLDER",
    seconds: float = HUB_SECONDS,
) -> str | None:
    """Why a set or a model cannot be had from the hub now; None where it can.

    One request, for its clients by themselves retry for half a minute and then look into their cache. A page that some
    network shows instead of the hub is no answer of the hub.

    Args:
        name: OWNER/NAME.
        kind: of what.
        instead: what may be given in its place.
        seconds: how long to wait for the answer, in all.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return OFFLINE.format(instead=instead)
    found = [UNREACHABLE]

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=seconds)
            found.append("")
        except RepositoryNotFoundError:
            found.append(ABSENT)
        except Exception:  # of a class that depends on the version
            found.append(UNREACHABLE)

    asking = Thread(target=ask, daemon=True)  # its own limit counts for each address of the hub
    asking.start()
    asking.join(seconds)
    return found[-1].format(kind={"dataset": "set"}.get(kind, kind), instead=instead) or None


@contextmanager
def cache_alone(offline: bool) -> Iterator[None]:
    """Context: the hub's client looks into its cache and asks nobody, if offline; the user's setting comes back."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
