"""Modules and a table -> one Python script: a dozen readable lines, and all the rest behind them, LZMA and base85.

The lines install an import loader, so that the modules stay modules: a traceback names module and line, and
`inspect.getsource`, which Triton kernels need, finds the source. The same content gives the same bytes.
"""

import base64
import json
import lzma
import re
from collections.abc import Mapping
from typing import Any

from fairway.artifact.bundle.names import shortened
from fairway.base.errors import ArtifactError, ContractError

FILTER = {
    "id": lzma.FILTER_LZMA1,
    "preset": 9 | lzma.PRESET_EXTREME,
    "dict_size": 1 << 20,
    **{"lc": 3, "lp": 0, "pb": 0},  # bytes of text stand in no alignment: 0.5 % less than pb = 2
}
MOST = 1 << 20  # bytes of all sources, which the dictionary must hold

HEAD = """# {title}
# To read the modules packed below: python {name} --unpack FOLDER
import base64, importlib.abc, importlib.util, json, linecache, lzma, sys, traceback

class Modules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def __init__(self, packed):
        table, *parts = lzma.decompress(base64.b85decode(packed)).decode().split("\\0")
        self.table, self.sources = json.loads(table), dict(zip(parts[::2], parts[1::2]))
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.sources else None
    def is_package(self, name):
        return any(other.startswith(name + ".") for other in self.sources)
    def get_source(self, name):
        return self.sources[name]
    def get_code(self, name):  # tracebacks and inspect.getsource look there
        place, source = f"{{__file__}}/{{name}}.py", self.sources[name]
        linecache.cache[place] = len(source), None, source.splitlines(True), place
        return compile(source, place, "exec")

if __name__ == "__main__":
    modules = Modules("{packed}")
    sys.meta_path.insert(0, modules)
    sys.excepthook = traceback.print_exception
    from {module} import {function}
    {function}(__file__, modules.table, modules.sources)
"""


def packed(modules: Mapping[str, str], table: Mapping[str, Any], entry: str, name: str, title: str) -> str:
    """The script's text. It calls `entry` ("package.module:function") with its own path, `table` (plain, JSON) and
    the sources.

    modules: {dotted name: source}, packages among them; name: of the script's file; title: its first line.
    """
    parts = [json.dumps(table, ensure_ascii=False, separators=(",", ":"))]
    for module, source in sorted(shortened(modules).items()):
        parts += [module, _narrow(source)]
    content = "\0".join(parts).encode()
    if content.count(b"\0") != len(parts) - 1 or len(content) > MOST:
        raise ContractError(f"{name}: a NUL in a source, or more than {MOST:,} bytes of sources; they cannot be packed")
    coded = base64.b85encode(lzma.compress(content, lzma.FORMAT_ALONE, filters=[FILTER])).decode()
    module, _, function = entry.partition(":")
    return HEAD.format(title=title, name=name, packed=coded, module=module, function=function)


def unpacked(script: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(table, modules) of a script that `packed` wrote; ArtifactError for any other."""
    try:
        (coded,) = re.findall(r'Modules\("([^"]*)"\)', script)
        table, *parts = lzma.decompress(base64.b85decode(coded)).decode().split("\0")
        return json.loads(table), dict(zip(parts[::2], parts[1::2], strict=True))
    except (ValueError, lzma.LZMAError) as error:
        raise ArtifactError(f"script: no packed modules in it ({error}); name one that `fairway` exported") from error


def _narrow(source: str) -> str:
    """Indented by one space instead of four (1.6 % less when packed), where that changes no string."""
    if "'''" in source or '"""' in source:  # a string of several lines, whose blanks are its own
        return source
    return re.sub(r"(?m)^(?:    )+", lambda blank: " " * (len(blank[0]) // 4), source)
