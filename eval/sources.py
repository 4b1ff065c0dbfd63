"""The modules of saap that make records, found by following their imports in the source text."""

import ast
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

ROOTS = ("saap.eval.run", "saap.eval.tasks.registry")
TOP = "saap"

Read = Callable[[Path], bytes]


def sources(read: Read = Path.read_bytes) -> dict[str, bytes]:
    """The source of each module that a record depends on, by name, in the order of the names.

    Imports are followed within `saap`, those inside functions too. Nothing is imported that has
    not been imported already, so modules that need a missing package (triton) are counted as well.
    `read`: gives the content of a file.
    """
    found: dict[str, bytes] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        path = None if name in found else path_of(name)
        if path is None:
            continue
        found[name] = read(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += imported(found[name], package)
        if "." in name:  # importing a module runs the packages that it is in
            waiting.append(name.rpartition(".")[0])
    return dict(sorted(found.items()))


def imported(source: bytes, package: str) -> Iterator[str]:
    """Names that a module of `package` may import; some of them are no modules.

    A module that calls `import_module` with a name that it computes, or hands its `__package__` to
    one that does, may import every module that a string in it names: `saap.routing`, or `numba`
    for the module of that name beside it.
    """
    tree = ast.parse(source)
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: package.count(".") + 2 - node.level]
                base = ".".join([*above, *filter(None, [base])])
            if is_ours(base):
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
    if b"import_module" in source or b"__package__" in source:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.removeprefix(".")
                if is_ours(text):
                    yield text
                elif text.isidentifier():
                    yield f"{package}.{text}"


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements, those inside functions too; expressions are not looked into."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, part, None)
            if isinstance(inner, list):  # the body of a lambda is an expression
                yield from (found for found in inner if isinstance(found, ast.stmt))
                waiting += inner


def is_ours(name: str) -> bool:
    return name == TOP or name.startswith(f"{TOP}.")


@functools.cache
def path_of(name: str) -> Path | None:
    """The file of a module or package; None for any other name."""
    package, _, last = name.rpartition(".")
    if package:
        above = path_of(package)
        if above is None or above.name != "__init__.py" or not last.isidentifier():
            return None
        for path in (above.parent / f"{last}.py", above.parent / last / "__init__.py"):
            if path.is_file():
                return path
    # In a checkout a package may lie elsewhere than in the folder of the package above it.
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin)
