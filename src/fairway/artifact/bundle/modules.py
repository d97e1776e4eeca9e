"""A module as the closure sees it: statements of its top level, the names each binds, and those it reads."""

import ast
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fairway.artifact.bundle.strip import stripped
from fairway.base.errors import ContractError

Chain = tuple[str, ...]
"""A name and the attributes read from it: `files.write` is ("files", "write")."""


@dataclass(frozen=True)
class Ask:
    """An attribute that is read; called: with how many arguments by place, and which by name. None: not called at once,
    or with arguments that only the running program knows."""

    name: str
    called: tuple[int, frozenset[str]] | None = None


CALLED_BY_NAME: dict[str, set[str]] = {  # bases whose makers call these methods, and no others, by their names
    **{base: set() for base in ("Protocol", "NamedTuple", "Exception", "object")},
    **{base: {"forward", "extra_repr"} for base in ("nn.Module", "torch.nn.Module")},
}


BUILDERS = {"build", "check"}
"""Functions (base/specs.py, base/recipes.py) that make an instance of their first argument from a table, by its fields'
annotations. Nothing else reads those."""


@dataclass(frozen=True)
class Link:
    """What an import binds a name to: the module `module`, or `name` in it."""

    module: str
    name: str | None = None


@dataclass(frozen=True)
class Statement:
    """One statement of a module's top level; of an import, one of its names.

    binds: the names that it gives the module; root: it works when the module is loaded, whatever is asked of it;
    link: what the import binds its name to; links: the same of imports deeper inside, by name; reads: what it reads;
    attributes: every attribute named in it; techniques: those that it names outright; optional: modules that only some
    recipes need; built: classes that are made of tables here; hints: what a class's fields are annotated with;
    methods: of a class, those that stay only where something reached asks for them (they are no part of `node` and of
    the rest here).
    """

    node: ast.stmt
    binds: frozenset[str]
    root: bool
    link: Link | None = None
    links: dict[str, Link] = field(default_factory=dict)
    reads: frozenset[Chain] = frozenset()
    attributes: frozenset[Ask] = frozenset()
    techniques: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    built: frozenset[Chain] = frozenset()
    hints: frozenset[Chain] = frozenset()
    methods: tuple["Statement", ...] = ()


@dataclass(frozen=True)
class Module:
    """name: dotted; statements: in the order of the file."""

    name: str
    package: bool
    statements: tuple[Statement, ...]


def find(root: Path, name: str) -> Path | None:
    """The file of a dotted module under `root`; None where there is none."""
    place = root.joinpath(*name.split("."))
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def read(root: Path, name: str) -> Module:
    """The module `name` under `root`, stripped; ContractError where there is none."""
    path = find(root, name)
    if path is None:
        raise ContractError(f"{name}: no such module under {root}; the script would lack it")
    return _read(path, name, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)  # both scripts of a run read most modules
def _read(path: Path, name: str, changed: int) -> Module:
    package = path.name == "__init__.py"
    tree = stripped(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    home = name if package else name.rpartition(".")[0]
    statements = [one for node in tree.body for one in _statements(node, home, name)]
    return Module(name, package, tuple(statements))


def asked(statement: Statement, asks: Iterable[Ask], method: bool = False) -> bool:
    """Whether one of the attributes that are read may mean what a statement binds: it has its name, and where it is
    called at once, a function takes these arguments. `"text".encode()` is no coder's encode(group, spec)."""
    return any(ask.name in statement.binds and _takes(statement.node, ask, method) for ask in asks)


def _takes(node: ast.stmt, ask: Ask, method: bool) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or ask.called is None:
        return True
    count, words = ask.called
    places = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)][method:]
    needed = set(places[: len(places) - len(node.args.defaults)])
    if count > len(places) and node.args.vararg is None:
        return False
    if not words <= {*places, *(argument.arg for argument in node.args.kwonlyargs)} and node.args.kwarg is None:
        return False
    return needed <= {*places[:count], *words}


def render(statements: Iterable[tuple[Statement, Collection[int], bool]]) -> str:
    """The source of some statements, each with those of its methods that stay, and whether it is made of tables: only
    then its fields' annotations are read. Imports from one place stand together.
    """
    nodes: list[ast.stmt] = []
    for statement, methods, built in statements:
        node, last = statement.node, nodes[-1] if nodes else None
        if isinstance(node, ast.ImportFrom):
            if isinstance(last, ast.ImportFrom) and (node.module, node.level) == (last.module, last.level):
                last.names += node.names
                continue
            node = ast.ImportFrom(node.module, list(node.names), node.level)
        if isinstance(node, ast.ClassDef):
            kept = [statement.methods[index].node for index in methods]
            body = sorted([*node.body, *kept], key=lambda part: part.lineno) or [ast.Pass()]
            body = body if built else [_bare(part) for part in body]
            node = ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list)
        nodes.append(node)
    return ast.unparse(ast.fix_missing_locations(ast.Module(nodes, []))) + "\n" if nodes else ""


def _bare(node: ast.stmt) -> ast.stmt:
    """A field whose annotation says no more than that it is one."""
    if not isinstance(node, ast.AnnAssign) or {"ClassVar", "InitVar", "KW_ONLY"} & set(_words(node.annotation)):
        return node
    bare = ast.AnnAssign(node.target, ast.Name("int", ast.Load()), node.value, node.simple)
    return ast.copy_location(bare, node)


def _words(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        yield inner.id if isinstance(inner, ast.Name) else inner.attr if isinstance(inner, ast.Attribute) else ""


def _statements(node: ast.stmt, home: str, module: str, own: frozenset[str] = frozenset()) -> Iterator[Statement]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            one: ast.stmt = ast.Import([alias])
            if isinstance(node, ast.ImportFrom):
                one = ast.ImportFrom(node.module, [alias], node.level)
            ((bound, link),) = _links(one, home)
            yield Statement(one, frozenset([bound]), root=False, link=link)
        return
    binds = frozenset(_bound(node))
    if "__all__" in binds:
        return
    methods: list[Statement] = []
    if isinstance(node, ast.ClassDef):
        own = frozenset(_given(node))
        for inner in [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name[:2] != "__"]:
            node.body.remove(inner)
            methods += _statements(inner, home, module, own)
    links = {bound: link for inner in ast.walk(node) for bound, link in _links(inner, home)}
    reads = _Reads(own, isinstance(node, ast.ClassDef))
    reads.visit(node)
    if "__file__" in {chain[0] for chain in reads.chains}:
        reads.chains.add((f"{module}: __file__",))
    yield Statement(
        node,
        binds,
        root=not binds or (isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and not _plain(node)),
        links=links,
        reads=frozenset(reads.chains),
        attributes=frozenset(reads.attributes),
        techniques=frozenset(reads.techniques),
        optional=frozenset(reads.optional),
        built=frozenset(reads.built),
        hints=frozenset(reads.hints),
        methods=tuple(methods),
    )


def _links(node: ast.AST, home: str) -> list[tuple[str, Link]]:
    """The names that an import binds, and to what; nothing of any other node."""
    if isinstance(node, ast.Import):
        return [(a.asname, Link(a.name)) if a.asname else (a.name.split(".")[0], Link(a.name)) for a in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
    source = ".".join([*above, *([node.module] if node.module else [])])
    if any(alias.name == "*" for alias in node.names):
        raise ContractError(f"from {source} import *: say which names; what they are is not known before it runs")
    return [(alias.asname or alias.name, Link(source, alias.name)) for alias in node.names]


def _bound(node: ast.stmt, imports: bool = True) -> Iterator[str]:
    """Names that a statement binds where it stands; what functions and classes bind inside is their own.

    imports: those of import statements too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    waiting: list[ast.AST] = [node]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.name
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in inner.names if imports)
        elif isinstance(inner, ast.ExceptHandler) and inner.name:
            yield inner.name
            waiting += ast.iter_child_nodes(inner)
        elif not isinstance(inner, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            waiting += ast.iter_child_nodes(inner)


def _given(node: ast.ClassDef) -> Iterator[str]:
    """The attributes that a class gives its instances: its fields, and what is assigned to self."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            yield inner.target.id
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value):
            yield inner.attr


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _plain(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> bool:
    """Whether an assignment binds names and nothing else: no attribute, no item of something."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return not any(isinstance(inner, ast.Attribute | ast.Subscript) for target in targets for inner in ast.walk(target))


def chain_of(node: ast.expr) -> Chain:
    """A dotted name; () for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    inner = chain_of(node.value) if isinstance(node, ast.Attribute) else ()
    return (*inner, node.attr) if inner and isinstance(node, ast.Attribute) else ()


def _quoted(annotation: ast.AST) -> Iterator[str]:
    """The types that an annotation names in quotes; words of Literal["..."] are none, whatever else has that name."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield annotation.value
    elif not (isinstance(annotation, ast.Subscript) and chain_of(annotation.value)[-1:] == ("Literal",)):
        for inner in ast.iter_child_nodes(annotation):
            yield from _quoted(inner)


class _Reads(ast.NodeVisitor):
    """Names of the module read with their attributes, quoted annotations included; techniques named outright."""

    def __init__(self, own: frozenset[str], fields: bool) -> None:
        self.fields = fields  # whether annotations are those of the class's fields
        self.own = own  # attributes that the class around gives its instances: self.x is no method's name there
        self.local: list[set[str]] = []  # what the functions around bind for themselves
        self.chains: set[Chain] = set()
        self.attributes: set[Ask] = set()
        self.techniques: set[str] = set()
        self.optional: set[str] = set()
        self.built: set[Chain] = set()
        self.hints: set[Chain] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehension(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        targets = (inner for part in node.generators for inner in ast.walk(part.target))
        self.local.append({inner.id for inner in targets if isinstance(inner, ast.Name)})
        self.generic_visit(node)
        self.local.pop()

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        outside: list[ast.AST] = [*node.args.defaults, *(value for value in node.args.kw_defaults if value)]
        body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
        if not isinstance(node, ast.Lambda):
            outside += [*node.decorator_list, *([node.returns] if node.returns else [])]
        arguments = [inner for inner in ast.walk(node.args) if isinstance(inner, ast.arg)]
        outside += [argument.annotation for argument in arguments if argument.annotation]
        for inner in outside:
            self.visit(inner)
        own = {name for part in body if isinstance(part, ast.stmt) for name in _bound(part, imports=False)}
        outer = [inner.names for part in body for inner in ast.walk(part) if isinstance(inner, ast.Global)]
        self.local.append({argument.arg for argument in arguments} | own - {name for names in outer for name in names})
        for part in body:
            self.visit(part)
        self.local.pop()

    def visit_Name(self, node: ast.Name) -> None:
        self._read(node.id)

    def _read(self, *chain: str) -> None:
        if not any(chain[0] in names for names in self.local):
            self.chains.add(chain)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self._ask(node)
        self._chain(node)

    def _ask(self, node: ast.Attribute, called: tuple[int, frozenset[str]] | None = None) -> None:
        if not (_is_self(node.value) and node.attr in self.own):
            self.attributes.add(Ask(node.attr, called))

    def _chain(self, node: ast.Attribute) -> None:
        chain, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            self._ask(inner)
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            self._read(inner.id, *reversed(chain))
        else:
            self.visit(inner)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self.visit(node.target)
        kept, self.chains = self.chains, self.hints if self.fields else self.chains
        self.visit(node.annotation)
        for quoted in _quoted(node.annotation):
            self.visit(ast.parse(quoted, mode="eval").body)
        self.chains = kept

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        if called == "technique" and len(words) >= 2:
            self.techniques.add(".".join(words[:2]))
        if called in BUILDERS and node.args and (chain := chain_of(node.args[0])):
            self.built.add(chain)
        if called == "optional" and words:
            self.optional.add(words[0])
        if called in ("getattr", "hasattr"):
            self.attributes.update(map(Ask, words))
        keywords = [word.arg for word in node.keywords]
        if isinstance(node.func, ast.Attribute) and None not in keywords:
            starred = any(isinstance(word, ast.Starred) for word in node.args)
            names = frozenset(word for word in keywords if word)
            self._ask(node.func, None if starred else (len(node.args), names))
            self._chain(node.func)
        else:
            self.visit(node.func)
        for inner in (*node.args, *node.keywords):
            self.visit(inner)
