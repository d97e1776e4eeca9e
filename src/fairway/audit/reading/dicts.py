"""Classes that are dicts whose keys are attributes as well, `class AttrDict(dict)`, as plain classes whose attributes
are looked up like keys: so every part of the audit reads their settings as it reads those of any other object."""

from __future__ import annotations

import ast

_DICTS = frozenset(("dict", "OrderedDict", "UserDict"))
_LOOKED_UP = frozenset(("__getattr__", "__setattr__", "__delattr__", "__getitem__", "__setitem__", "__missing__"))
_MADE = "super().__init__", "dict.__init__"
_FILL = "for name, value in dict(*given, **named).items():\n    setattr(self, name, value)\n"
_METHODS = f"""
def __init__(self, *given, **named):
    {_FILL.replace(chr(10), chr(10) + "    ")}
def update(self, *given, **named):
    {_FILL.replace(chr(10), chr(10) + "    ")}
def __getitem__(self, name):
    return getattr(self, name)
def __setitem__(self, name, value):
    setattr(self, name, value)
def __contains__(self, name):
    return name in self.__dict__
def __iter__(self):
    return iter(self.__dict__)
def items(self):
    return self.__dict__.items()
def keys(self):
    return self.__dict__.keys()
def values(self):
    return self.__dict__.values()
def get(self, name, default=None):
    return self.__dict__.get(name, default)
"""


def as_objects(tree: ast.Module) -> ast.Module:
    """The same tree, such classes put in other words; lines stay what they were."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _is_open(node):
            node.bases = [base for base in node.bases if _name(base) not in _DICTS]
            own = [each for each in node.body if _names(each).isdisjoint(_LOOKED_UP)]
            own = [_Plain().visit(each) for each in own]
            has = {name for each in own for name in _names(each)}
            more = [each for each in ast.parse(_METHODS).body if _names(each).isdisjoint(has)]
            for each in more:
                for part in ast.walk(each):
                    ast.copy_location(part, node)
            node.body = [*own, *more]
            ast.fix_missing_locations(node)
    return tree


def _is_open(node: ast.ClassDef) -> bool:
    """Whether it is a dict, and what is asked of it by a dot is looked up among its keys."""
    if not any(_name(base) in _DICTS for base in node.bases):
        return False
    names = {name for each in node.body for name in _names(each)}
    return "__getattr__" in names or any(map(_is_itself, ast.walk(node)))


def _is_itself(node: ast.AST) -> bool:
    """self.__dict__ = self"""
    return isinstance(node, ast.Assign) and ast.unparse(node) == "self.__dict__ = self"


def _name(node: ast.expr) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _names(statement: ast.AST) -> set[str]:
    """The name that a statement of a class defines, `__getattr__ = dict.__getitem__` among them."""
    if isinstance(statement, ast.Assign):
        return {each.id for each in statement.targets if isinstance(each, ast.Name)}
    return {str(getattr(statement, "name", ""))}


class _Plain(ast.NodeTransformer):
    """self[key] as an attribute, and what makes a dict of arguments as a loop over them."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if _is_itself(node):
            return ast.copy_location(ast.Pass(), node)
        target = node.targets[0]
        if isinstance(target, ast.Subscript) and _name(target.value) == "self":
            given: list[ast.expr] = [target.value, self.visit(target.slice), self.visit(node.value)]
            given[0] = ast.copy_location(ast.Name("self", ast.Load()), target)
            return _at(node, ast.Expr(ast.Call(ast.Name("setattr", ast.Load()), given, [])))
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and _name(node.value) == "self":
            return _at(node, ast.Call(ast.Name("getattr", ast.Load()), [node.value, node.slice], []))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.AST]:
        call = node.value
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(_MADE):
            return self.generic_visit(node)
        args = call.args[1:] if ast.unparse(call.func).startswith("dict") else call.args
        if not args and not call.keywords:
            return ast.copy_location(ast.Pass(), node)
        loop = ast.parse(_FILL).body[0]
        assert isinstance(loop, ast.For)
        assert isinstance(loop.iter, ast.Call)
        assert isinstance(loop.iter.func, ast.Attribute)
        loop.iter.func.value = ast.Call(ast.Name("dict", ast.Load()), args, call.keywords)
        return _at(node, loop)


def _at(place: ast.AST, made: ast.AST) -> ast.AST:
    """What was made stands where the other did."""
    for part in ast.walk(made):
        if not hasattr(part, "lineno") or part.lineno == 1:
            ast.copy_location(part, place)
    return made


__all__ = ["as_objects"]
