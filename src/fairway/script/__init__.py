"""What an exported script runs: an entry for training, one for scoring, and what the environment may say."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from fairway.base.errors import RecipeError


class Arguments(argparse.ArgumentParser):
    """A script's words; what is not understood is an error in one line."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; {' '.join(self.format_usage().split())}")


def unpacked(sources: Mapping[str, str]) -> bool:
    """Writes the modules of the script out, one file each, where it was called with --unpack FOLDER."""
    if sys.argv[1:2] != ["--unpack"]:
        return False
    if len(sys.argv) != 3:
        raise RecipeError("--unpack: name one folder")
    for name, source in sources.items():
        package = any(other.startswith(f"{name}.") for other in sources)
        path = Path(sys.argv[2], *name.split("."), *["__init__"][: int(package)]).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return True
