"""From ``module:QualName`` in a file to the code that it names, and back.

The order of the checks is the point: how it is written, whether it is trusted, and only then
the import; then whether what came out is defined where the reference says.
"""

from __future__ import annotations

import difflib
import importlib
from types import BuiltinFunctionType, FunctionType, ModuleType

from robo_orchard_core.utils.config.errors import ConfigReferenceError, TrustError
from robo_orchard_core.utils.config.trust import Trust, is_dotted_name

Code = type | FunctionType | BuiltinFunctionType
"""What a reference can lead to."""


def reference_to(code: Code) -> str:
    """The reference that names a class or function.

    >>> reference_to(Trust)
    'robo_orchard_core.utils.config.trust:Trust'
    """
    return f"{code.__module__}:{code.__qualname__}"


def split(reference: str) -> tuple[str, str]:
    """Module and qualified name.

    Raises:
        ConfigReferenceError: The reference isn't written as one.
    """
    module, _, qualname = reference.partition(":")
    if not is_dotted_name(module) or not is_dotted_name(qualname):
        raise ConfigReferenceError(
            f"expected a reference like 'package.module:ClassName', found {reference!r}"
        )
    return module, qualname


def resolve(reference: str, trust: Trust) -> Code:
    """The class or function that a reference names, imported only if it is trusted.

    Raises:
        TrustError: It lies outside the trust; nothing was imported.
        ConfigReferenceError: It is written wrongly, its module can't be imported, or what it
            leads to is no class or function defined there.
    """
    module_name, qualname = split(reference)
    if not trust.covers(module_name, qualname):
        package = module_name.partition(".")[0]
        packages = f" ({', '.join(sorted(trust.packages))})" if trust.packages else ""
        raise TrustError(
            f"the reference {reference!r} lies outside the trusted packages{packages}; "
            f"if you trust its code, name it: trust=({package!r},) in code, --trust {package} "
            "on the command line"
        )
    if module_name.endswith(".__main__"):
        # Importing one runs the package's command.
        raise ConfigReferenceError(f"{reference!r} names a command, not a module of classes")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        problem = f"the module of {reference!r} can't be imported: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            problem += "; install it, or start where Python finds it"
        raise ConfigReferenceError(problem) from error
    return found_in(module, qualname, reference)


def _is_of(module: ModuleType, code: object) -> bool:
    return isinstance(code, Code) and code.__module__ == module.__name__


def found_in(module: ModuleType, qualname: str, reference: str) -> Code:
    """What the module defines under a qualified name, without calling anything on the way.

    Raises:
        ConfigReferenceError: There is nothing, or something that is defined elsewhere.
    """
    found: object = module
    for part in qualname.split("."):
        # Looked up in the namespace, so that no __getattr__, property or descriptor runs; only
        # a class is looked into, so that no path leads through a module that was imported here.
        space = vars(found) if found is module or isinstance(found, type) else {}
        if part not in space:
            problem = f"{reference!r} names nothing: no {part!r} is defined there"
            here = [name for name, code in space.items() if _is_of(module, code)]
            near = difflib.get_close_matches(part, here, n=1)
            problem += f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigReferenceError(problem)
        found = space[part]
        if isinstance(found, staticmethod):
            found = found.__func__
    if not isinstance(found, Code):
        kind = type(found).__qualname__
        problem = f"{reference!r} leads to a {kind}, expected a class or function defined there"
        raise ConfigReferenceError(problem)
    if reference_to(found) != reference:
        raise ConfigReferenceError(
            f"{reference!r} leads to something that is defined elsewhere; "
            f"name it where it is defined, {reference_to(found)!r}"
        )
    return found
