"""Objects of the user's own modules, named on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_object(option: str, place: str) -> Any:
    """What `place`, MODULE:NAME, names; the module is sought in the current folder first.

    option: for messages. The current folder stays on sys.path, because the module may import its
    neighbours later. Raises ValueError, in one line, where there is no such module or name, or the
    module cannot be imported.
    """
    module, colon, name = place.partition(":")
    if not (colon and module and name):
        raise ValueError(f"{option} is {place!r}, expected MODULE:NAME")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # anybody's code may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if absent and (module == error.name or module.startswith(f"{error.name}.")):
            raise ValueError(
                f"{option} {place}: no module {error.name!r} in {folder} or among the installed "
                "packages"
            ) from None
        text = " ".join(str(error).split())
        raise ValueError(
            f"{option} {place}: importing {module} raised {type(error).__name__}: {text}"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option} {place}: {module} has no {name!r}")
        found = getattr(found, part)
    return found
