"""Ask the Hugging Face hub once, within a time limit, whether it has a data set or model, before loading it."""

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
    """Why a data set or model cannot be downloaded from the hub now, in words; None if it can.

    This is one request. The hub's own clients would retry for half a minute and then look into their cache. The answer
    must come from the hub's API, so a network's login page counts as unreachable.

    Args:
        name: OWNER/NAME.
        kind: "dataset" or "model".
        instead: what the message proposes to give instead.
        seconds: total time to wait for the hub's answer.
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
        except Exception:  # its class depends on the client's version
            found.append(UNREACHABLE)

    asking = Thread(target=ask, daemon=True)  # the request's timeout counts per IP address of the hub
    asking.start()
    asking.join(seconds)
    return found[-1].format(kind={"dataset": "set"}.get(kind, kind), instead=instead) or None


@contextmanager
def cache_alone(offline: bool) -> Iterator[None]:
    """Context: if `offline`, the hub's client uses only its cache; the user's setting is restored at the end."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
