"""The rules of the package's structure: who may import whom, side effects, sizes.

`violations` checks a mapping of module names to source texts, so that the rules themselves are tested
on planted violations. A new module of the package needs a row in `LAYERS`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "prolong_jax"
ROOT = Path(__file__).parent.parent

# A name stands for the module or for a subpackage with all its modules. Imports go downwards only.
LAYERS = (
    ("presets",),
    ("types", "config", "model_files"),
    (
        "masked",
        "mesh",
        "processes",
        "tokenizer",
        "reset_rules",
        "advantages",
        "shaping",
        "verifiers",
        "roofline",
        "charts",
    ),
    ("sequences", "optimizer", "models", "data", "next_token", "slots", "scores", "stages"),
    ("losses", "packing"),
    ("objectives",),
    ("sampler", "update", "checkpoint", "metrics"),
    ("groups", "outcomes", "policy", "startup"),
    ("rollout",),
    ("host", "control"),
    ("train", "evaluate", "passk", "compile_check", "export", "report", "sample", "replay"),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# Libraries that only these parts may import, directly or through other modules of the package.
ONLY_IN = {
    "flax": ("models",),
    "orbax": ("checkpoint",),
    "wandb": ("metrics",),
    "tensorboardX": ("metrics",),
}
JAX_FREE = ("verifiers", "data")
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}

# The pure mathematics sees nothing but numbers: no configuration, no input or output.
PURE = ("masked", "sequences", "losses", "objectives", "advantages", "shaping", "scores")
PURE_LIBRARIES = {"jax", "jaxtyping", "numpy", "math", "functools", "typing", "dataclasses"}
PURE_LIBRARIES |= {"collections", "enum", "inspect", f"{PACKAGE}.types", f"{PACKAGE}.masked"}
PURE_LIBRARIES |= {f"{PACKAGE}.sequences", f"{PACKAGE}.losses"}

# Side effects belong here; the doors to the program (the last layer) are free as well.
EFFECTFUL = ("data", "model_files", "models.hf", "models.tensors", "checkpoint", "metrics")
EFFECTFUL += ("verifiers.pool", "verifiers.sandbox", "verifiers.sandbox_zygote", "processes")
EFFECTFUL += (*LAYERS[-1], "control", "startup")
READERS = ("config", "tokenizer", "outcomes", "policy")  # read what the user names, write nothing
EFFECT_LIBRARIES = {"subprocess", "multiprocessing", "socket", "shutil", "tempfile", "signal"}
EFFECT_LIBRARIES |= {"urllib", "http", "requests", "random"}
WRITING_CALLS = {"print", "input", "write_text", "write_bytes", "mkdir", "makedirs", "unlink"}
WRITING_CALLS |= {"rmdir", "touch", "symlink_to", "system", "popen"}
READING_CALLS = {"open", "read_text", "read_bytes"}
FORBIDDEN_CALLS = {"eval", "exec"}  # a response is never run in the trainer
RUNS_PROGRAMS = ("verifiers.sandbox_zygote",)  # but in a process of its own

CORE = "types masked losses advantages stages sampler update rollout train".split()
MAX_CORE_LINES = 1800
MAX_PACKAGE_LINES = 15_500
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8
MAX_NESTING = 3

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def read_package() -> dict[str, str]:
    """Source text by module name relative to the package; a package's own file has its name."""
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        key = name + ".__init__" if parts[-1] == "__init__" and name else name
        sources[key or "__init__"] = path.read_text(encoding="utf-8")
    return sources


def within(module: str, parts: tuple[str, ...]) -> bool:
    """Whether the module is one of the parts or lies inside one."""
    return any(module == part or module.startswith(part + ".") for part in parts)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The absolute name that an import statement of the module starts from."""
    if not node.level:
        return node.module or ""
    package = f"{PACKAGE}.{module}".split(".")[: -node.level]
    return ".".join(package + ([node.module] if node.module else []))


def imports(source: str, module: str, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, inside functions and of literal names too.

    Under `if __name__ == "__main__"` a module is a program, which may start any other.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_main_guard(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in modules or (base == PACKAGE and alias.name[0] != "_")
                yield node.lineno, inner if is_module else base
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            literals = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(value)) for value in literals)


def called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def import_violation(module: str, name: str) -> str | None:
    """What is wrong with the module importing a name of the package; None if nothing is."""
    target = name.removeprefix(PACKAGE).removeprefix(".")
    if not target:
        return None
    source, aim = module.split(".")[0], target.split(".")[0]
    if aim not in LAYER_OF:
        return f"imports {name}, which the layer table does not know"
    if source == aim or (source == "train" and aim in LAYERS[-1]):
        return None  # inside one part; and train knows everything
    if aim == "train":
        return "imports train, which nothing may import"
    if LAYER_OF[aim] >= LAYER_OF[source]:
        return f"imports {aim} (layer {LAYER_OF[aim]}) from layer {LAYER_OF[source]}, not downwards"
    return None


def library_violation(module: str, name: str) -> str | None:
    """What is wrong with the module importing an outside library; None if nothing is."""
    library = name.split(".")[0]
    if library in ("experiments", "tests"):
        return f"imports {library}, which the package must not know"
    if library in ONLY_IN and not within(module, ONLY_IN[library]):
        return f"imports {library}, which only {' '.join(ONLY_IN[library])} may"
    if within(module, JAX_FREE) and library in JAX_LIBRARIES:
        return f"imports {library}, but {' and '.join(JAX_FREE)} never import jax"
    if library in EFFECT_LIBRARIES and not within(module, EFFECTFUL):
        return f"imports {library}, but has no place among the modules with side effects"
    return None


def import_violations(module: str, source: str, modules: frozenset[str]) -> Iterator[str]:
    """Every import of the module that breaks a rule."""
    for line, name in sorted(set(imports(source, module, modules))):
        inside = name == PACKAGE or name.startswith(PACKAGE + ".")
        found = import_violation(module, name) if inside else library_violation(module, name)
        if found is None and module in PURE:
            allowed = name in PURE_LIBRARIES or name.split(".")[0] in PURE_LIBRARIES
            found = None if allowed else f"imports {name}, but is pure mathematics"
        if found is not None:
            yield f"{module}:{line}: {found}"


def effect_violations(module: str, source: str) -> Iterator[str]:
    """Calls that read, write or run something from a module that should not."""
    forbidden = set() if module in RUNS_PROGRAMS else set(FORBIDDEN_CALLS)
    if not within(module, EFFECTFUL):
        forbidden |= WRITING_CALLS
        forbidden |= set() if module in READERS else READING_CALLS
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or called(node) not in forbidden:
            continue
        method = isinstance(node.func, ast.Attribute)
        if not (method and called(node) in FORBIDDEN_CALLS):
            yield f"{module}:{node.lineno}: calls {called(node)}, a side effect out of place"


def jax_chain(module: str, graph: Mapping[str, set[str]]) -> list[str]:
    """The shortest chain of imports from the module to jax, inside the package; empty if none."""
    chains, seen = [[module]], {module}
    for chain in chains:
        for name in sorted(graph.get(chain[-1], set())):
            if name.split(".")[0] in JAX_LIBRARIES:
                return [*chain, name]
            if name not in seen:
                seen.add(name)
                chains.append([*chain, name])
    return []


def transitive_violations(sources: Mapping[str, str]) -> Iterator[str]:
    """Modules that must not know jax, but load it through another module of the package."""
    modules = frozenset(f"{PACKAGE}.{name.removesuffix('.__init__')}" for name in sources)
    graph = {}
    for module, source in sources.items():
        names = {name for _, name in imports(source, module, modules)}
        graph[module.removesuffix(".__init__")] = {
            name.removeprefix(PACKAGE + ".")
            for name in names
            if name.split(".")[0] in {PACKAGE, *JAX_LIBRARIES}
        }
    for module in graph:
        chain = jax_chain(module, graph) if within(module, JAX_FREE) else []
        if len(chain) > 2:
            yield f"{module}: reaches jax: {' -> '.join(chain)}"


def nesting(body: list[ast.stmt]) -> int:
    """Levels of control flow in a function body; an elif is no level, a nested function its own."""
    deepest = 0
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        depth = 1 if isinstance(node, BLOCKS) else 0
        for inner in child_blocks(node):
            elif_ = isinstance(node, ast.If) and inner is node.orelse and is_elif(inner)
            deepest = max(deepest, nesting(inner) + (0 if elif_ else depth))
    return deepest


def is_elif(body: list[ast.stmt]) -> bool:
    return len(body) == 1 and isinstance(body[0], ast.If)


def child_blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The statement lists inside a statement, with those of its handlers and cases."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block:
            yield block
    for branch in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
        yield branch.body


def size_violations(module: str, source: str) -> Iterator[str]:
    """Functions that are too long, too wide or too deep."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FUNCTIONS):
            continue
        where = f"{module}:{node.lineno}: {node.name}"
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        spec = node.args
        names = [arg.arg for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]]
        arguments = len([name for name in names if name not in ("self", "cls")])
        arguments += (spec.vararg is not None) + (spec.kwarg is not None)
        if lines > MAX_FUNCTION_LINES:
            yield f"{where} has {lines} lines, more than {MAX_FUNCTION_LINES}"
        if arguments > MAX_ARGUMENTS:
            yield f"{where} has {arguments} arguments, more than {MAX_ARGUMENTS}"
        if nesting(node.body) > MAX_NESTING:
            yield f"{where} nests {nesting(node.body)} levels, more than {MAX_NESTING}"


def budget_violations(sources: Mapping[str, str]) -> Iterator[str]:
    """Line counts of the core files and of the package against their budgets."""
    lines = {module: len(source.splitlines()) for module, source in sources.items()}
    core = sum(lines.get(module, 0) for module in CORE)
    if core > MAX_CORE_LINES:
        yield f"the core files have {core} lines, more than {MAX_CORE_LINES}"
    if sum(lines.values()) > MAX_PACKAGE_LINES:
        yield f"the package has {sum(lines.values())} lines, more than {MAX_PACKAGE_LINES}"


def violations(sources: Mapping[str, str]) -> list[str]:
    """Every broken rule in the sources, one line each."""
    modules = frozenset(f"{PACKAGE}.{name.removesuffix('.__init__')}" for name in sources)
    found = [*budget_violations(sources), *transitive_violations(sources)]
    for module, source in sources.items():
        known = module == "__init__" or module.split(".")[0] in LAYER_OF
        if not known:
            found.append(f"{module}: not in the layer table of tests/layering_test.py; add it")
            continue
        if module == "__init__":
            names = [name for _, name in imports(source, module, modules)]
            found += [f"__init__: imports {name}, but loads nothing" for name in names]
            continue
        found += import_violations(module, source, modules)
        found += effect_violations(module, source)
        found += size_violations(module, source)
    return found


def test_package_keeps_the_rules():
    sources = read_package()
    assert sources, "no module was found"
    assert not (found := violations(sources)), "\n" + "\n".join(found)


def test_core_files_exist():
    missing = [name for name in CORE if not (ROOT / PACKAGE / f"{name}.py").exists()]
    assert not missing, f"the nine core files lack {missing}"


def planted(module: str, source: str) -> list[str]:
    return violations({"__init__": "", "types": "", "verifiers.__init__": "", module: source})


LONG = "def f():\n" + "    x = 1\n" * 60
WIDE = "def f(a, b, c, d, *, e, f, g, h, i): pass\n"
DEEP = """
def f(x):
    for i in x:
        if i:
            with i:
                while i:
                    pass
"""
PLANTED = [
    ("sampler", "from prolong_jax import rollout", "not downwards"),
    ("sampler", "from prolong_jax.rollout import collect", "not downwards"),
    ("sampler", "def f():\n    import prolong_jax.rollout", "not downwards"),
    ("sampler", "from .rollout import collect", "not downwards"),
    ("models.decoder", "from ..sampler import generate", "not downwards"),
    (
        "data.mixture",
        "import importlib\nimportlib.import_module('prolong_jax.rollout')",
        "downwards",
    ),
    ("update", "from prolong_jax.sampler import generate", "not downwards"),
    ("config", "from prolong_jax.types import Batch", "not downwards"),
    ("report", "from prolong_jax.train import main", "nothing may import"),
    ("losses", "from prolong_jax.config import Loss", "pure mathematics"),
    ("losses", "import os", "pure mathematics"),
    ("advantages", "from pathlib import Path", "pure mathematics"),
    ("masked", "import logging", "pure mathematics"),
    ("verifiers.math", "import jax.numpy as jnp", "never import jax"),
    ("data.mixture", "def f():\n    from jax import random", "never import jax"),
    ("sampler", "from flax import nnx", "only models may"),
    ("train", "import flax.nnx", "only models may"),
    ("train", "import wandb", "only metrics may"),
    ("train", "from experiments.configs import tiny", "must not know"),
    ("update", "import subprocess", "side effects"),
    ("rollout", "def f():\n    print('hello')", "calls print"),
    ("stages", "def f(path):\n    return path.read_text()", "calls read_text"),
    ("config", "def f(path):\n    path.write_text('x')", "calls write_text"),
    ("train", "def f(text):\n    return eval(text)", "calls eval"),
    ("trainer", "", "not in the layer table"),
    ("sampler", "import prolong_jax.helpers", "does not know"),
    ("__init__", "import prolong_jax.types", "loads nothing"),
    ("update", LONG, "61 lines"),
    ("update", WIDE, "9 arguments"),
    ("update", DEEP, "nests 4 levels"),
    ("losses", "x = 1\n" * 1801, "core files have 1801"),
    ("evaluate", "x = 1\n" * (MAX_PACKAGE_LINES + 1), f"package has {MAX_PACKAGE_LINES + 1}"),
]


@pytest.mark.parametrize(
    ("module", "source", "message"), PLANTED, ids=[f"{row[0]}-{row[2]}" for row in PLANTED]
)
def test_planted_violation_is_found(module: str, source: str, message: str):
    found = planted(module, source)
    assert len(found) == 1 and message in found[0], found


def test_jax_through_another_module_is_found():
    sources = {"types": "import jax", "data.prompts": "from prolong_jax.types import Batch"}
    assert violations(sources) == ["data.prompts: reaches jax: data.prompts -> types -> jax"]


def test_lawful_sources_pass():
    elifs = "def f(x):\n    if x == 0:\n        pass\n" + "    elif x:\n        pass\n" * 5
    sources = {
        "__init__": '"""Doc."""\n__version__ = "1"\n',
        "types": "import jax\n",
        "losses": "import jax.numpy as jnp\nfrom collections.abc import Mapping\n"
        "from prolong_jax.masked import token_mean\n" + elifs,
        "masked": "from prolong_jax.types import Mean\n",
        "models.__init__": "from prolong_jax.models.decoder import Decoder\n",
        "models.decoder": "from flax import nnx\nfrom . import cache\n",
        "models.cache": "",
        "models.hf": "def f(path):\n    return path.read_bytes()\n",
        "verifiers.pool": "import multiprocessing\nfrom prolong_jax.verifiers import math\n",
        "verifiers.math": "def f(model):\n    return model.eval()\n",
        "report": "def f(path):\n    path.write_text('x')\n",
        "train": "from prolong_jax import report, rollout\nprint('hello')\n",
        "rollout": "from prolong_jax import sampler, verifiers\n",
        "sampler": "",
    }
    assert violations(sources) == []


IMPORT_ALL = """
import importlib, pkgutil, sys
import prolong_jax
assert not {"jax", "numpy"} & set(sys.modules), "prolong_jax itself is not light"
for part in PARTS:
    package = importlib.import_module(f"prolong_jax.{part}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert "jax" not in sys.modules, "jax was loaded"
""".replace("PARTS", repr(JAX_FREE))


def test_verifiers_and_data_load_without_jax():
    subprocess.run([sys.executable, "-c", IMPORT_ALL], check=True, cwd=ROOT, timeout=120)
