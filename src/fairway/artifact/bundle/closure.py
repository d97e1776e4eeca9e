"""What a script needs of the house: everything reached from its entry, and nothing else.

The unit is a definition, not a file: `from fairway.score import evaluate` reaches `evaluate` and what it reads, and of
`fairway/score/__init__.py` the one import that leads there. Techniques are looked up by name while the program runs; of
those that the recipe names (and of those named outright in what is reached) everything stays whose name occurs as an
attribute in what is reached: `module_of(spec).decode(...)` keeps every `decode`.
"""

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fairway.artifact.bundle.modules import (
    CALLED_BY_NAME,
    Ask,
    Link,
    Module,
    Statement,
    asked,
    chain_of,
    find,
    read,
    render,
)
from fairway.base.errors import ContractError, RecipeError

ALWAYS = {"Spec"}  # of a technique: what tells that it is one


@dataclass(frozen=True)
class Closure:
    """modules: {dotted name: stripped source}, packages among them; foreign: the packages beyond, by their import's
    first name, the standard library's included."""

    modules: dict[str, str]
    foreign: frozenset[str]


def closure(
    root: Path, entry: str, techniques: Iterable[str] = (), wants: Callable[[str], bool] = lambda name: True
) -> Closure:
    """All that `entry` ("package.module:function", whole modules without a function) reaches, with `techniques`.

    root: the folder that the package lies in; wants: whether an optional module is (`slots.optional`). RecipeError for
    a technique that has no file; ContractError for what cannot be told before it runs: a star import, `__file__`, a
    name that its module does not have.
    """
    reach = _Reach(root, entry.split(".")[0].split(":")[0], wants)
    module, _, function = entry.partition(":")
    if function:
        reach.want(module, function)
    else:
        reach.want_all(module)
    for name in sorted(techniques):
        reach.take(name)
    reach.settle()
    return Closure({name: reach.source(name) for name in sorted(reach.modules)}, frozenset(reach.foreign))


def imported(sources: Iterable[str]) -> frozenset[str]:
    """The first names of all that some sources import, anywhere in them."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return frozenset(name.split(".")[0] for name in names)


class _Reach:
    def __init__(self, root: Path, package: str, wants: Callable[[str], bool]) -> None:
        self.root, self.package, self.wants = root, package, wants
        self.modules: dict[str, Module] = {}
        self.kept: dict[str, dict[int, set[int]]] = {}  # of each module: {statement: its methods}
        self.built: set[tuple[str, str]] = set()  # classes that are made of tables, by module and name
        self.techniques: list[str] = []
        self.attributes: set[Ask] = set(map(Ask, ALWAYS))
        self.foreign: set[str] = set()

    def ours(self, name: str) -> bool:
        return name.split(".")[0] == self.package

    def load(self, name: str) -> Module:
        """A module and the packages above it, with what each does when it is loaded."""
        parent = name.rpartition(".")[0]
        if parent:
            self.load(parent)
        if name not in self.modules:
            module = self.modules[name] = read(self.root, name)
            self.kept[name] = {}
            for index, statement in enumerate(module.statements):
                if statement.root:
                    self.keep(module, index)
        return self.modules[name]

    def take(self, name: str) -> None:
        """A technique: what of it stays is settled last."""
        if find(self.root, name) is None:
            raise RecipeError(f"{name}: the recipe names this technique, but it has no file; nothing to export")
        if name not in self.techniques:
            self.load(name)
            self.techniques.append(name)

    def settle(self) -> None:
        """Keeps what is asked for by its name alone, of techniques and of classes, until nothing more is."""
        size = (-1, -1, -1)
        while size != (size := (len(self.attributes), len(self.techniques), sum(map(len, self.kept.values())))):
            for module in [self.modules[name] for name in self.techniques]:
                for index, statement in enumerate(module.statements):
                    if statement.link is None and asked(statement, self.by_name(statement)):
                        self.keep(module, index)
                    if statement.binds & ALWAYS:
                        self.build((module.name, "Spec"))
            for module in list(self.modules.values()):
                for index, methods in list(self.kept[module.name].items()):
                    for number, method in enumerate(module.statements[index].methods):
                        if number not in methods and asked(method, self.by_name(method), method=True):
                            methods.add(number)
                            self.read(module, method)

    def by_name(self, statement: Statement) -> list[Ask]:
        return [ask for ask in self.attributes if ask.name in statement.binds]

    def want(self, name: str, bound: str) -> None:
        """`bound` of the module `name`: what binds it there, or the submodule of that name."""
        module = self.load(name)
        found = [index for index, statement in enumerate(module.statements) if bound in statement.binds]
        for index in found:
            self.keep(module, index)
        if found and bound in ALWAYS:  # its Spec leads from there to the module
            self.take(name)
            self.build((name, bound))
        if found or bound.startswith("__"):
            return
        if not module.package or find(self.root, f"{name}.{bound}") is None:
            raise ContractError(f"{name}: nothing in it is called {bound!r}; the script would fail where it is read")
        self.load(f"{name}.{bound}")

    def want_all(self, name: str) -> None:
        module = self.load(name)
        for index in range(len(module.statements)):
            self.keep(module, index)

    def keep(self, module: Module, index: int) -> None:
        if index in self.kept[module.name]:
            return
        statement = module.statements[index]
        kept = self.kept[module.name][index] = set[int]()
        self.read(module, statement)
        called = self.called(module, statement) if statement.methods else set()
        for number, method in enumerate(statement.methods):
            if called is None or method.binds & called:
                kept.add(number)
                self.read(module, method)

    def called(self, module: Module, statement: Statement) -> set[str] | None:
        """The methods of a class that its bases call by their names; None where some base is not known: all may be."""
        found: set[str] = set()
        for base in statement.node.bases if isinstance(statement.node, ast.ClassDef) else ():
            plain = base.value if isinstance(base, ast.Subscript) else base  # Generic[T] is called as Generic is
            if (known := CALLED_BY_NAME.get(ast.unparse(plain))) is None:
                place = self.follow(module, statement, chain_of(plain))
                above = self.load(place[0]) if place is not None else None
                classes = [one for one in above.statements if place[1] in one.binds] if above and place else []
                known = self.called(above, classes[0]) if above and classes else None
            if known is None:
                return None
            found |= known
        return found

    def read(self, module: Module, statement: Statement) -> None:
        """A statement stays, and with it what it asks for."""
        self.attributes |= statement.attributes
        for link in ([statement.link] if statement.link else []) + list(statement.links.values()):
            self.enter(link)
        for name in sorted(statement.techniques | set(filter(self.wants, statement.optional))):
            self.take(name)
        for chain in sorted(statement.reads):
            self.follow(module, statement, chain)
        for chain in sorted(statement.built):
            self.build(self.follow(module, statement, chain))

    def build(self, place: tuple[str, str] | None) -> None:
        """A class is made of tables: what its fields are annotated with stays, and is made of tables as well."""
        if place is None or place in self.built:
            return
        self.built.add(place)
        module = self.load(place[0])
        for statement in module.statements:
            if place[1] in statement.binds:
                for chain in sorted(statement.hints or statement.reads):  # an alias has no fields: what it stands for
                    self.build(self.follow(module, statement, chain))

    def enter(self, link: Link) -> None:
        """What an import statement alone asks for."""
        if not self.ours(link.module):
            self.foreign.add(link.module.split(".")[0])
        elif link.name is None:
            self.load(link.module)
        else:
            self.want(link.module, link.name)

    def follow(self, module: Module, statement: Statement, chain: tuple[str, ...]) -> tuple[str, str] | None:
        """A name that is read, with its attributes: through modules to what it means, which stays. The module of ours
        and the name in it that it was found under; None for anything else."""
        name, *attributes = chain
        if name.endswith("__file__"):
            where = name if ":" in name else f"{module.name}: {name}"
            raise ContractError(f"{where}: a script has no files of its own; hand the place over")
        link = statement.links.get(name)
        if link is None:
            if not any(name in one.binds for one in module.statements):
                return None  # a local name, or a built-in
            self.want(module.name, name)
            links = [one.link for one in module.statements if name in one.binds and one.link is not None]
            if not links:
                return module.name, name
            link = links[0]
        place = self.module_of(link, name)
        if place is None:
            return self.home(link)
        while place is not None:
            if not attributes:
                self.want_all(place)  # the module itself is handed on: anything of it may be asked for
                return None
            bound, *attributes = attributes
            self.want(place, bound)
            statements = self.modules[place].statements
            links = [one.link for one in statements if bound in one.binds and one.link is not None]
            if links:
                place = self.module_of(links[0], bound)
                if place is None:
                    return self.home(links[0])
            elif any(bound in one.binds for one in statements):
                return place, bound
            else:
                place = f"{place}.{bound}" if find(self.root, f"{place}.{bound}") is not None else None
        return None

    def home(self, link: Link) -> tuple[str, str] | None:
        """Where what a link leads to is defined, through whatever passes it on."""
        if not self.ours(link.module) or link.name is None:
            return None
        for statement in self.load(link.module).statements:
            if link.name in statement.binds:
                return self.home(statement.link) if statement.link is not None else (link.module, link.name)
        return None

    def module_of(self, link: Link, bound: str) -> str | None:
        """The module of ours that a link leads to; None where it leads to something in a module, or abroad."""
        if not self.ours(link.module):
            return None
        if link.name is None:  # `import a.b` binds a, `import a.b as c` binds the module itself
            return link.module if bound != link.module.split(".")[0] else self.package
        statements = self.load(link.module).statements
        for statement in statements:
            if link.name in statement.binds:
                return self.module_of(statement.link, link.name) if statement.link is not None else None
        below = f"{link.module}.{link.name}"
        return below if find(self.root, below) is not None else None

    def source(self, name: str) -> str:
        module = self.modules[name]
        return render(
            (statement, methods, any((name, bound) in self.built for bound in statement.binds))
            for statement, methods in (
                (module.statements[index], kept) for index, kept in sorted(self.kept[name].items())
            )
        )
