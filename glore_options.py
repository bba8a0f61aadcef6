"""Options, declared once: as a field of a dataclass that carries type, default, help and aliases.

The parts of the port declare the options that they understand (:class:`Options`, a group), a
command puts groups together (:class:`JobOptions`), and :func:`parse` makes the command line and the
YAML file (``--config``) of them. What was settled is written by :func:`as_yaml`, which ``--config``
reads again, and compared with that of an earlier run by :func:`differences`.

A group travels as it is: who needs ``batch_size`` takes the object that has it.
"""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
import typing
from typing import Any, Callable, ClassVar, NoReturn, Optional, Union

import yaml

from glore_common import UsageError, called_as, closest_first

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another spelling of an option that reads its value in a way of its own.

    Parameters
    ----------
    flag
        With its dashes.
    kind
        Turns one word of the command line into a value.
    nargs, const, metavar
        As for ``argparse``.
    """

    flag: str
    kind: Optional[Callable[[str], Any]] = None
    nargs: Optional[str] = None
    const: Any = None
    metavar: Optional[str] = None


def option(
    default: Any,
    help: str,
    *,
    kind: Optional[Callable[[str], Any]] = None,
    aliases: tuple[Union[str, Alias], ...] = (),
    choices: Optional[tuple] = None,
    metavar: Optional[str] = None,
    const: Any = None,
    several: bool = False,
    positional: bool = False,
    compare: bool = True,
) -> Any:
    """Declare an option: a field of an :class:`Options` class.

    Parameters
    ----------
    default
        Its value when nothing is said; None where it is worked out later.
    help
        What ``--help`` says; the default is added unless this names it.
    kind
        Turns text into a value, or raises ``ValueError`` or ``argparse.ArgumentTypeError``. By
        default that of the field's annotation (``bool``, ``int``, ``float``, ``str``).
    aliases
        Other names of the flag, with their dashes.
    choices
        The values that are allowed.
    metavar
        How ``--help`` calls the value.
    const
        Its value when the flag stands alone; None: a value must follow.
    several
        Whether it takes several words, and may be given several times; the value is the tuple of
        all, and ``kind`` reads one.
    positional
        Whether it may be given without its flag as well.
    compare
        Whether a resumed run says that it has another value than before.
    """
    metadata = {
        "help": help,
        "kind": kind,
        "aliases": aliases,
        "choices": choices,
        "metavar": metavar,
        "const": const,
        "several": several,
        "positional": positional,
        "compare": compare,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Options:
    """A group of options; subclasses declare fields with :func:`option`.

    Attributes
    ----------
    title
        Heading in ``--help``.
    exclusive
        Names of options of which one at most may be given.
    """

    title: ClassVar[str] = ""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()


def group(cls: type, **defaults: Any) -> Any:
    """Declare a group in a :class:`JobOptions` class, with defaults of the job's own."""
    return dataclasses.field(default_factory=lambda: cls(**defaults))


@dataclasses.dataclass
class JobOptions:
    """All options of a command; subclasses declare groups with :func:`group`.

    Attributes
    ----------
    first
        Names of the groups that ``--help`` begins with.
    given
        Names of the options that the command line or the file gave.
    command_line
        As it was typed.
    """

    first: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.given: set[str] = set()
        self.command_line = ""

    def groups(self) -> dict[str, Options]:
        """Return the groups by name."""
        names = [field.name for field in dataclasses.fields(self)]
        last = len(names)
        names.sort(key=lambda name: self.first.index(name) if name in self.first else last)
        return {name: getattr(self, name) for name in names}

    def fields(self) -> dict[str, tuple[Options, dataclasses.Field]]:
        """Return (group, field) of every option by its name, which is unique in a job."""
        found: dict[str, tuple[Options, dataclasses.Field]] = {}
        for members in self.groups().values():
            for field in dataclasses.fields(members):
                if field.name in found:
                    raise TypeError(f"two groups declare {field.name}")
                found[field.name] = (members, field)
        return found

    def settle(self, **values: Any) -> None:
        """Set the options among these that are None, and so were left to be worked out."""
        known = self.fields()
        for name, value in values.items():
            if getattr(known[name][0], name) is None:
                setattr(known[name][0], name, value)


def flag_of(name: str) -> str:
    """Return ``--batch-size`` of ``batch_size``."""
    return "--" + name.replace("_", "-")


# --- values ---------------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    """Return the truth value of ``True``, ``no``, ``1``, … (letter case ignored)."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def comma_list(
    element: Callable[[str], Any], length: Optional[int] = None
) -> Callable[[str], tuple]:
    """Return a kind for comma-separated values: ``comma_list(int)("45,65") == (45, 65)``."""

    def convert(text: str) -> tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            values = tuple(element(part) for part in parts)
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no comma-separated list of {element.__name__}"
            ) from None
        if length is not None and len(values) != length:
            raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} values, not {length}")
        return values

    return convert


def number(
    element: Callable[[str], Any],
    low: float = -math.inf,
    high: float = math.inf,
    above: Optional[float] = None,
) -> Callable[[str], Any]:
    """Return a kind for a finite number within bounds; ``above`` is itself excluded."""

    def convert(text: str) -> Any:
        try:
            value = element(text)
        except ValueError:
            kind = "whole number" if element is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}") from None
        within = low <= value <= high and (above is None or value > above)
        if not within or not math.isfinite(value):
            bounds = f"above {above:g}" if above is not None else f"{low:g} or more"
            if low == -math.inf and above is None:
                bounds = "finite"
            bounds += "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    convert.__name__ = element.__name__  # for messages of lists
    return convert


positive_int = number(int, low=1)
count = number(int, low=0)
positive_float = number(float, above=0.0)
share = number(float, low=0.0, high=1.0)
seed = number(int, 0, 2**31 - 1)
# Far beyond any recipe that works; more is a slip, or ends in NaN.
learning_rate = number(float, above=0.0, high=1e4)
epochs = number(float, 0.0, 1e6)


def size(low: int, high: int, memory: Callable[[int], float], what: str) -> Callable[[str], int]:
    """Return a kind for a size, which says what memory one that is too large would take.

    Parameters
    ----------
    low, high
        Smallest and largest value.
    memory
        Bytes that a value takes.
    what
        What takes them.
    """

    def convert(text: str) -> int:
        value = number(int)(text)
        if not low <= value <= high:
            message = f"{text} is out of range: it must be {low} to {high}"
            if value > high:
                message += f" ({what} of {value} takes {memory(value) / 2**30:.3g} GiB)"
            raise argparse.ArgumentTypeError(message)
        return value

    return convert


# The side of an input, of a colour image in float32; and the width of a GloRe unit's graph.
pixels = size(1, 8192, lambda side: 12 * side**2, "one image with a side")
width = size(1, 16384, lambda nodes: 4 * nodes**2, "one weight of a unit's graph")


def samples(text: str) -> int:
    """Return a sample count; ``2.4e5`` is accepted beside ``240000``."""
    value = float(text)
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise ValueError(text)
    return int(value)


def three(element: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Return a kind for three comma-separated values, or one for all channels."""

    def convert(text: str) -> tuple:
        values = comma_list(element)(text)
        if len(values) not in (1, 3):
            raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} values, not 3 (or 1)")
        return values if len(values) == 3 else values * 3

    return convert


# --- command line ---------------------------------------------------------------------------------


class _Words(argparse.Action):
    """Adds the words of a positional option to those that its flag gave, if there are any."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values:
            setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), *values])


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` without abbreviations whose errors are one line.

    An unknown option is answered with the nearest ones.
    """

    def __init__(self, description: str, prog: Optional[str] = None) -> None:
        super().__init__(
            description=description,
            prog=prog or called_as(),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse strictly: an unknown option ends the program with exit code 2."""
        # Options may stand between several positional words.
        mixed = any(action.nargs == "*" for action in self._get_positional_actions())
        read = self.parse_known_intermixed_args if mixed else self.parse_known_args
        parsed, unknown = read(args, namespace)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            flag = unknown[0].split("=")[0]
            if flag.startswith("-"):
                near = closest_first(flag, self._option_string_actions)[:3]
                message += f" (closest: {', '.join(near)})"
            self.error(message)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and end the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


def _kind_of(group: Options, field: dataclasses.Field) -> Callable[[str], Any]:
    """Return what turns text into a value of the field."""
    if field.metadata["kind"] is not None:
        return field.metadata["kind"]
    annotation = typing.get_type_hints(type(group))[field.name]
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    plain = members[0] if members and typing.get_origin(annotation) is Union else annotation
    kinds: dict[Any, Callable[[str], Any]] = {
        bool: boolean,
        int: number(int),
        float: number(float),
        str: str,
    }
    if field.metadata["several"] and members:
        plain = members[0]  # of tuple[str, ...]
    if plain not in kinds:
        raise TypeError(f"{field.name} needs a kind: {annotation} is none that text is read as")
    return kinds[plain]


def _shown_default(default: Any) -> str:
    """Return what ``--help`` says of a default; nothing of one that is worked out later."""
    if default is None or default == "" or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" (default: {default})"


def _add_option(target, group: Options, field: dataclasses.Field) -> None:
    facts, kind = field.metadata, _kind_of(group, field)
    text = facts["help"]
    if "default:" not in text:
        text += _shown_default(getattr(group, field.name))
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    plain = [alias for alias in facts["aliases"] if isinstance(alias, str)]
    settings: dict[str, Any] = {"type": kind, "metavar": facts["metavar"], **common}
    if kind is boolean:
        settings.update(nargs="?", const=True, metavar=facts["metavar"] or "BOOL")
    if facts["const"] is not None:
        settings.update(nargs="?", const=facts["const"])
    if facts["several"]:
        settings.update(nargs="+", action="extend")
    if facts["choices"] is not None:
        settings["choices"] = facts["choices"]
    if facts["positional"]:
        shown = facts["metavar"] or field.name.upper()
        same = f"the same as {flag_of(field.name)}"
        # Several words: the flag is then for --config and for what begins with a dash.
        words: dict[str, Any] = {"nargs": "?"}
        if facts["several"]:
            words = {"nargs": "*", "action": _Words}
        target.add_argument(
            field.name, type=kind, metavar=shown, default=argparse.SUPPRESS, help=same, **words
        )
    target.add_argument(flag_of(field.name), *plain, help=text.replace("%", "%%"), **settings)
    for alias in facts["aliases"]:
        if isinstance(alias, Alias):
            target.add_argument(
                alias.flag,
                type=alias.kind or kind,
                nargs=alias.nargs,
                const=alias.const,
                metavar=alias.metavar or facts["metavar"],
                help=f"see {flag_of(field.name)}",
                **common,
            )


def make_parser(options: JobOptions, description: str, prog: Optional[str] = None) -> Parser:
    """Return the command line's parser of a job's options; only what is given ends up in it."""
    parser = Parser(description, prog)
    for members in options.groups().values():
        target = parser.add_argument_group(members.title)
        exclusive = {
            name: target.add_mutually_exclusive_group()
            for names in members.exclusive
            for name in names[:1]
        }
        place = {name: exclusive[names[0]] for names in members.exclusive for name in names}
        for field in dataclasses.fields(members):
            _add_option(place.get(field.name, target), members, field)
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help="YAML file that sets any of these options; the command line comes after it",
    )
    options.fields()  # unique names
    return parser


# --- YAML -----------------------------------------------------------------------------------------


def _text_of(value: Any) -> str:
    """Return a YAML value as the text that the command line would have had."""
    if isinstance(value, (list, tuple)):
        return ",".join(_text_of(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def read_config(path: str, options: JobOptions) -> dict[str, Any]:
    """Return the options that a YAML file gives, by name.

    They stand at its top level or in a section of their group's name; ``null`` leaves an option
    as it is.

    Raises
    ------
    UsageError
        With file and option, if one is unknown or has a wrong value.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold lines such as batch_size: 8")
    flat: dict[str, Any] = {}
    groups, known = options.groups(), options.fields()
    for key, value in content.items():
        # A group may bear the name of one of its options.
        rows = value if isinstance(value, dict) and key in groups else {key: value}
        for name, setting in rows.items():
            name = str(name).replace("-", "_")
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, known, 3, 0.0))
                raise UsageError(f"--config {path}: unknown option {name!r} (closest: {near})")
            if name in flat:
                raise UsageError(f"--config {path} sets {name} twice")
            if setting is not None:
                flat[name] = setting
    result = {}
    for name, setting in flat.items():
        members, field = known[name]
        try:
            if isinstance(setting, dict):
                raise ValueError("it is a section")
            kind = _kind_of(members, field)
            if field.metadata["several"]:
                words = setting if isinstance(setting, list) else [setting]
                value = tuple(kind(_text_of(word)) for word in words)
            else:
                value = kind(_text_of(setting))
            choices = field.metadata["choices"]
            if choices is not None and value not in choices:
                raise ValueError(f"it must be one of: {', '.join(map(str, choices))}")
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"--config {path}: {name}: {setting!r}: {error}") from error
        result[name] = value
    for members in groups.values():
        for names in members.exclusive:
            both = [name for name in names if result.get(name) not in (None, ())]
            if len(both) > 1:
                raise UsageError(f"--config {path} gives {' and '.join(both)}: give one of them")
    return result


def parse(
    options: JobOptions,
    argv: Optional[list[str]] = None,
    description: str = "",
    prog: Optional[str] = None,
    epilog: Optional[str] = None,
) -> Any:
    """Fill in a job's options from ``--config`` and the command line, which wins.

    Parameters
    ----------
    options
        With the job's defaults; it is filled in.
    argv
        Words of the command line; those of the process by default.
    description, prog, epilog
        Of ``--help``.

    Returns
    -------
    JobOptions
        ``options``, with ``given`` and ``command_line``.
    """
    parser = make_parser(options, description, prog)
    parser.epilog = epilog
    words = sys.argv[1:] if argv is None else list(argv)
    typed = vars(parser.parse_args(words))
    path = typed.pop("config")
    settings = read_config(path, options) if path else {}
    known = options.fields()
    for name in typed:
        for names in known[name][0].exclusive:
            if name in names:
                for other in names:
                    settings.pop(other, None)
    settings.update(typed)
    for name, value in settings.items():
        if isinstance(value, list):
            value = tuple(value)
        setattr(known[name][0], name, value)
    options.given = set(settings)
    name = called_as()
    called = ["python", name] if name.endswith(".py") else name.split()
    options.command_line = shlex.join([*called, *words])
    return options


def as_dict(options: JobOptions) -> dict[str, dict[str, Any]]:
    """Return the values of all options by group, as JSON and YAML can hold them."""

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {
        name: {
            field.name: plain(getattr(members, field.name)) for field in dataclasses.fields(members)
        }
        for name, members in options.groups().items()
    }


def as_yaml(options: JobOptions) -> str:
    """Return the file that ``--config`` makes the same options of, with how they came about."""
    head = f"# {options.command_line}\n"
    return head + yaml.safe_dump(as_dict(options), sort_keys=False, allow_unicode=True)


def differences(options: JobOptions, earlier: dict[str, dict[str, Any]]) -> list[str]:
    """Return lines ``--batch-size: 8 -> 16`` for what is not as in an earlier run.

    Parameters
    ----------
    options
        Of now.
    earlier
        What :func:`as_dict` gave then. An option that it lacks is not compared.
    """
    now = as_dict(options)
    lines = []
    for name, members in options.groups().items():
        for field in dataclasses.fields(members):
            then = earlier.get(name, {})
            if not field.metadata["compare"] or field.name not in then:
                continue
            ours, theirs = now[name][field.name], then[field.name]
            if ours != theirs:
                lines.append(f"{flag_of(field.name)}: {theirs} -> {ours}")
    return lines
