"""No call in our code executes its input, by a search beyond the linter's.

Ruff's rules (flake8-bandit's) find eval, exec, pickle, marshal, yaml.load and shells.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
NEVER = {
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "os.system", "os.popen"),
    *("torch.hub.load", "torch.jit.load", "numpy.load", "pandas.read_pickle"),
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def unsafe(code: str) -> Iterator[str]:
    """Yield the calls of a module that may execute their input, as ``line: name``."""
    nodes = [*ast.walk(ast.parse(code))]
    names = dict(name for node in nodes for name in imported(node))
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            called = dotted(node, names)
            if called in NEVER or called.split(".")[0] in UNPICKLERS:
                yield f"{node.lineno}: {called}"
        if isinstance(node, ast.Call) and dotted(node.func, names) == "torch.load":
            safe = [k.value for k in node.keywords if k.arg == "weights_only"]
            if not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True):
                yield f"{node.lineno}: torch.load"


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names bound by an import, with their targets."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.split(".")[0]
            yield (alias.asname, alias.name) if alias.asname else (top, top)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the full name of an expression, resolved by the module's imports."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def test_no_input_is_executed() -> None:
    """No module evaluates text, unpickles, or loads YAML or torch files unsafely."""
    sources = sorted(SRC.rglob("*.py"))
    assert len(sources) > 100
    found = [f"{path.name}:{call}" for path in sources for call in unsafe(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import pickle as p; p.loads(b'')",
        "from pickle import loads; loads(b'')",
        "def f():\n    import dill\n    dill.load",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load as read; read('')",
        "import torch; torch.load(path)",
        "import torch as t; t.load(path, weights_only=False)",
        "from torch import load; load(path, weights_only=maybe)",
        "from torch import hub; hub.load('a', 'b')",
        "import os.path; os.system('x')",
    ],
)
def test_unsafe_calls_are_found(code: str) -> None:
    """Unsafe calls are found under any imported name."""
    assert [*unsafe(code)]


def test_safe_calls_are_not_reported() -> None:
    """Safe uses of the same libraries are not reported."""
    assert not [
        *unsafe(
            "import torch, yaml, re, json\n"
            "torch.load(path, weights_only=True); model.eval(); re.compile('a'); json.load(file)\n"
            "yaml.parse(text); torch.compile(model)"
        )
    ]


PLANTED = {
    "S102": "exec(text)",
    "S301": "import pickle\n\npickle.loads(data)",
    "S302": "import marshal\n\nmarshal.loads(data)",
    "S307": "eval(text)",
    "S506": "import yaml\n\nyaml.load(text, Loader=yaml.Loader)",
    "S602": "import subprocess\n\nsubprocess.run(text, shell=True)",
    "S604": "run(text, shell=True)",
    "S605": "import os\n\nos.system(text)",
}


def test_the_linter_finds_the_other_unsafe_calls() -> None:
    """Ruff reports each planted call with the project's settings."""
    for rule, code in PLANTED.items():
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--stdin-filename", SRC / "planted.py", "-"],
            input=f"{code}\n",
            cwd=SRC.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert rule in done.stdout, (rule, done)
