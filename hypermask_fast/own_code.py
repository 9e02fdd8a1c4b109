"""Functions of the user's own, by name: `path/to/file.py:function` or `module:function`.

Calling one runs the code of its file. So only what the user has named on a command line, or in a configuration that was
given to train, comes here: never a name from a run's folder or a checkpoint alone.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError

_DIGITS = 16  # of a fingerprint: a change by chance of the same 64 bits does not happen
_LIBRARY = Path(__file__).parent
_called: set[str] = set()  # files of the user's, whose functions were called
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_REQUIRED = (*_NAMED, inspect.Parameter.POSITIONAL_ONLY)


def is_own(name: str) -> bool:
    """Whether a name is of this kind: no other name of a scenario or network has a colon."""
    return ":" in name


def is_file(name: str) -> bool:
    """Whether it names a function in a file, not in a module."""
    place = name.rpartition(":")[0]
    return place.endswith(".py") or "/" in place or "\\" in place


def absolute(name: str) -> str:
    """The same name with its file's path absolute, so that it holds wherever it is read again."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{function}" if is_file(name) else name


def short(name: str) -> str:
    """For people: "mine.py:tasks" for a file of any folder. Names of other kinds stay as they are."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).name}:{function}" if is_file(name) else name


def portable(name: str) -> str:
    """What of the name decides a run's numbers: not where the file lies, whose content has its `fingerprint`."""
    return ":" + name.rpartition(":")[2] if is_file(name) else name


def fingerprint(name: str, what: str) -> str:
    """The first digits of the SHA-256 of the file that the function is in; files that it imports are not in it.

    what: "scenario" or "network", for messages.

    Raises:
        InputError: no such file or module.
    """
    return hashlib.sha256(_content(_source(name, what), name, what)).hexdigest()[:_DIGITS]


def call(name: str, what: str, arguments: dict[str, Any], needed: Iterable[str] = ()) -> Any:
    """function(**those of `arguments` that it takes).

    Args:
        name: the function's.
        what: "scenario" or "network", for messages.
        arguments: all that it may take, by name.
        needed: those of them that would be ignored wrongly if it did not take them.

    Raises:
        InputError: no such file, module or function, it raises anything, or it asks for other arguments. One line.
    """
    function = _function(name, what)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"{_told(name, what)} does not say which arguments it takes: wrap it in a function") from error
    takes = {each.name for each in parameters if each.kind in _NAMED}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        takes |= arguments.keys()
    listed = ", ".join(arguments)
    for each in parameters:
        if each.kind in _REQUIRED and each.default is each.empty and each.name not in takes & arguments.keys():
            raise InputError(f"{_told(name, what)} asks for an argument {each.name!r}: what it may take is {listed}")
    for each in needed:
        if each not in takes:
            raise InputError(f"{each} is set, and {_told(name, what)} takes no argument of that name")
    return guarded(name, what, lambda: function(**{each: arguments[each] for each in arguments if each in takes}))


def blamed(error: BaseException) -> str | None:
    """What there is to say of an error that code of the user's has raised, such as a Dataset's; None where it was not
    raised there, or by a call of this library."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in _called:
            return f"{Path(frame.filename).name}, line {frame.lineno}, raised {_said(error)}"
        if Path(frame.filename).is_relative_to(_LIBRARY):
            break
    for source in _called:  # of a DataLoader's own process the traceback is text
        if f'File "{source}", line' in (text := str(error)):
            return f"{Path(source).name} raised {text.rstrip().splitlines()[-1]}"
    return None


def guarded(name: str, what: str, action: Callable[[], Any]) -> Any:
    """`action()`, code of the user's. Raises InputError, one line with the place, where it raises anything."""
    return _guarded(name, what, _source(name, what), action)


def _guarded(name: str, what: str, source: Path | None, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except InputError as error:
        raise InputError(f"{_told(name, what)}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{_told(name, what)} raised {_said(error)}{_place(error, source)}") from error


def _said(error: BaseException) -> str:
    said = error.msg if isinstance(error, SyntaxError) else str(error)  # the place comes behind it
    said = textwrap.shorten(said, 300, placeholder=" ...")
    return type(error).__name__ + (f": {said}" if said else "")


def _told(name: str, what: str) -> str:
    return f"{what} {short(name)}"


def _place(error: BaseException, source: Path | None) -> str:
    """ " (mine.py, line 12)": where in the user's file, if it was there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(source)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _function(name: str, what: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    source = _source(name, what)
    _called.add(str(source))
    if is_file(name):
        content = _content(source, name, what)
        module = _guarded(name, what, source, lambda: _module_of_file(source, content))
    else:
        module = _guarded(name, what, source, lambda: importlib.import_module(place))
    if not hasattr(module, attribute):
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(f"{_told(name, what)}: {source} has no function {attribute!r}{meant}")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"{_told(name, what)} must be a function, it is of type {type(function).__name__}")
    return function


@functools.cache
def _module_of_file(path: Path, content: bytes) -> ModuleType:
    """The file as a module, run once; what lies beside it can be imported by it, after what is installed."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # A name by which it is found again, for pickling and dataclasses, and which is nobody else's.
    module_name = f"hypermask_own_{hashlib.sha256(str(path).encode() + content).hexdigest()[:_DIGITS]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _source(name: str, what: str) -> Path:
    """The file that the function is in."""
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise InputError(f"{what} {name!r} names no function: it is path/to/file.py:function or module:function")
    if is_file(name):
        path = Path(place).expanduser().resolve()
        if not place.endswith(".py"):
            raise InputError(f"{_told(name, what)}: {path} is no Python file (.py)")
        if not path.is_file():
            raise InputError(f"{_told(name, what)}: there is no file {path}")
        return path
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        spec = _guarded(name, what, None, lambda: importlib.util.find_spec(place))
    except InputError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and place.startswith(str(error.__cause__.name)):
            spec = None
        else:
            raise
    if spec is None:
        raise InputError(
            f"{_told(name, what)}: there is no module {place!r}, neither installed nor in {Path.cwd()}; a file is "
            "named by its path, such as mine.py:function"
        )
    if spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"{_told(name, what)}: module {place!r} has no file of its own: put the function into one")
    return Path(spec.origin)


def _content(path: Path, name: str, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{_told(name, what)}: {path} cannot be read: {error.strerror}") from error
