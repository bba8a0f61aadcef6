"""Writes the pages of docs/ that are made from the code: ``python test/docs/generate.py``.

docs/networks.md comes from the table of networks, docs/options.md from the option classes,
docs/reference.md from signatures and docstrings. ``test_docs.py`` compares the files with this.
"""

import ast
import dataclasses
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Union

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from glore_options import JobOptions, Options, flag_of  # noqa: E402
from network import summary  # noqa: E402

TABLE_START = "<!-- table: python test/docs/generate.py -->"
TABLE_END = "<!-- end of table -->"
NOTE = "<!-- Written by `python test/docs/generate.py`; change the code, not this page. -->\n\n"

# What a user of the library calls, by subject. "package" stands for the names of its __all__.
MODULES = {
    "Networks": (
        "network",
        "network.builder",
        "network.block",
        "network.pretrained",
        "network.summary",
        "network.memory",
        "network.onnx_graph",
        "network.internals",
        "network.block_statistics",
    ),
    "Models to use": ("jobs.zoo", "jobs.model"),
    "Stored parameters": (
        "checkpoint.params",
        "checkpoint.paths",
        "checkpoint.graph",
        "checkpoint.manifest",
        "checkpoint.store",
        "checkpoint.released",
        "checkpoint.torch_file",
        "checkpoint.safetensors_file",
    ),
    "Data": (
        "dataset",
        "dataset.cub200",
        "dataset.relations",
        "data.common.loader",
        "data.video.loaders",
        "data.image.source",
        "data.image.loaders",
        "data.segmentation.labels",
        "data.segmentation.source",
        "data.segmentation.loaders",
        "data.detection.coco",
        "data.detection.loaders",
    ),
    "Training": (
        "train.loop",
        "train.task",
        "train.segmentation",
        "train.detection",
        "train.coco_scores",
        "train.schedule",
        "train.optimizer",
        "train.metric",
        "train.precise_bn",
        "train.scoring",
    ),
    "Basics": ("glore_common", "mxnet_compat"),
}
# Module and class of each command's options.
COMMANDS = {
    "train_kinetics.py": ("jobs.options", "KineticsOptions"),
    "train_imagenet.py": ("jobs.options", "ImagenetOptions"),
    "train_classifier.py": ("jobs.options", "ClassifierOptions"),
    "train_segmentation.py": ("jobs.options", "SegmentationOptions"),
    "train_detection.py": ("jobs.options", "DetectionOptions"),
    "evaluate.py": ("jobs.options", "EvaluateOptions"),
    "compare_released.py": ("jobs.options", "CompareOptions"),
    "predict.py": ("jobs.predict", "PredictOptions"),
    "extract_features.py": ("jobs.extract_features", "ExtractOptions"),
    "export.py": ("jobs.export", "ExportOptions"),
    "quantize.py": ("jobs.quantize", "QuantizeOptions"),
    "serve.py": ("jobs.serve", "ServeOptions"),
    "explain.py": ("jobs.options", "ExplainOptions"),
    "launch.py": ("jobs.launch", "LaunchJobOptions"),
    "dataset.prepare_videos": ("dataset.prepare_videos", "PrepareOptions"),
    "dataset.demo": ("dataset.demo", "DemoJobOptions"),
    "dataset.demo_images": ("dataset.demo_images", "DemoImagesJobOptions"),
    "dataset.demo_streets": ("dataset.demo_streets", "DemoStreetsJobOptions"),
    "dataset.demo_harbours": ("dataset.demo_harbours", "DemoHarboursJobOptions"),
}
SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Attributes", "Notes", "Examples")
INNER = re.compile(r"[\w*]+(, [\w*]+)* : ")
Definition = Union[ast.FunctionDef, ast.ClassDef]


# --- docstrings -----------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a line of a docstring in Markdown."""
    text = re.sub(r":[a-z:]+:`~?([^`]*)`", r"``\1``", text)
    return text.replace("``", "`")


def paragraphs(lines: list[str]) -> str:
    """Return running text in Markdown; what is indented, or typed in Python, becomes code."""
    result: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if block.startswith((" ", ">>>")):
            result.append(f"```\n{textwrap.dedent(block)}\n```")
            continue
        text = plain(" ".join(block.split()))
        text = text[:-2] if text == "::" else re.sub("::$", ":", text)
        if text:
            result.append(text)
    return "\n\n".join(result)


def entries(lines: list[str], quoted: bool) -> str:
    """Return a section's ``name : type`` and indented text as a list; mere text as it is."""
    if not any(line.startswith(" ") for line in lines) and not quoted:
        return paragraphs(lines)
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and rows:
            rows[-1].append(line)
        elif line.strip():
            rows.append([line.strip()])
    result = []
    for head, *rest in rows:
        name, _, kind = head.partition(" : ")
        said = f"`{name}`" + (f" ({plain(kind)})" if kind else "") if quoted else plain(head)
        inner = textwrap.dedent("\n".join(rest)).splitlines()
        # Keywords that are described one by one, within the description of **keywords.
        first = next((i for i, line in enumerate(inner) if INNER.match(line)), len(inner))
        text = plain(" ".join(" ".join(inner[:first]).split()))
        result.append(f"- {said}{': ' if text else ''}{text}")
        if first < len(inner):
            result.append(textwrap.indent(entries(inner[first:], quoted), "  "))
    return result[0][2:] if len(result) == 1 and not quoted else "\n".join(result)


def in_markdown(docstring: str) -> str:
    """Return a NumPy docstring in Markdown."""
    lines = docstring.splitlines()
    heads = [
        number
        for number in range(len(lines) - 1)
        if lines[number] in SECTIONS and set(lines[number + 1].strip()) == {"-"}
    ]
    result = [paragraphs(lines[: heads[0] if heads else None])]
    for start, end in zip(heads, [*heads[1:], len(lines)]):
        name, body = lines[start], lines[start + 2 : end]
        listed = name in ("Parameters", "Raises", "Attributes")
        running = name in ("Notes", "Examples")
        text = paragraphs(body) if running else entries(body, listed)
        apart = listed or running or text.startswith("- ")
        result.append(f"**{name}**\n\n{text}" if apart else f"**{name}** {text}")
    return "\n\n".join(part for part in result if part)


# --- reference ------------------------------------------------------------------------------------


def path_of(module: str) -> Path:
    """Return the file of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_public(node: Definition) -> bool:
    """Tell whether a function or class is for others."""
    return not node.name.startswith("_")


def exported(package: str, tree: ast.Module) -> Iterator[tuple[str, Definition, str]]:
    """Yield (source, definition, name) of what a package's ``__init__`` takes from its modules."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            source = path_of(f"{package}.{node.module}").read_text(encoding="utf-8")
            names = [alias.name for alias in node.names]
            for found in ast.parse(source).body:
                if isinstance(found, (ast.FunctionDef, ast.ClassDef)) and found.name in names:
                    yield source, found, found.name


def definitions(module: str) -> Iterator[tuple[str, Definition, str]]:
    """Yield (source, definition, name) of what a module is for."""
    source = path_of(module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    if path_of(module).name == "__init__.py":
        yield from exported(module, tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_public(node):
            yield source, node, node.name


def signature(source: str, node: ast.FunctionDef, name: str, method: bool = False) -> str:
    """Return ``name(a, b=1) -> int`` with annotations and defaults as they are in the source."""

    def said(part: ast.AST) -> str:
        return " ".join((ast.get_source_segment(source, part) or "").split())

    def one(argument: ast.arg, default: Union[ast.AST, None]) -> str:
        text = argument.arg
        if argument.annotation is not None:
            text += f": {said(argument.annotation)}"
        if default is None:
            return text
        return f"{text} = {said(default)}" if argument.annotation else f"{text}={said(default)}"

    parts = node.args
    positional = [*parts.posonlyargs, *parts.args]
    defaults = [None] * (len(positional) - len(parts.defaults)) + list(parts.defaults)
    words = [one(*pair) for pair in zip(positional, defaults)]
    static = any(
        isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list
    )
    if method and not static:
        words = words[1:]
    if parts.vararg:
        words.append(f"*{one(parts.vararg, None)}")
    elif parts.kwonlyargs:
        words.append("*")
    words += [one(*pair) for pair in zip(parts.kwonlyargs, parts.kw_defaults)]
    if parts.kwarg:
        words.append(f"**{one(parts.kwarg, None)}")
    ending = f" -> {said(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(words)}){ending}"
    if len(line) <= 96:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){ending}"


def fields_of(source: str, node: ast.ClassDef) -> list[str]:
    """Return the declared fields of a dataclass or named tuple: ``name: type = default``."""
    marks = [ast.get_source_segment(source, part) or "" for part in node.decorator_list]
    bases = [ast.get_source_segment(source, part) or "" for part in node.bases]
    if not any("dataclass" in mark for mark in marks) and "NamedTuple" not in bases:
        return []
    return [
        " ".join((ast.get_source_segment(source, part) or "").split())
        for part in node.body
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_")
    ]


def described(source: str, node: Definition, name: str) -> str:
    """Return a definition's part of the page."""
    parts = [f"#### {name}"]
    docstring = ast.get_docstring(node)
    if isinstance(node, ast.FunctionDef):
        parts.append(f"```\n{signature(source, node, name)}\n```")
        return "\n\n".join([*parts, in_markdown(docstring or "")])
    inner = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    starts = [part for part in inner if part.name == "__init__"]
    fields = fields_of(source, node)
    if starts:
        parts.append(f"```\n{signature(source, starts[0], name, method=True)}\n```")
    elif fields:
        parts.append(
            "```\n" + "\n".join([f"class {name}:", *(f"    {row}" for row in fields)]) + "\n```"
        )
    parts.append(in_markdown(docstring or ""))
    for part in inner:
        text = ast.get_docstring(part)
        if is_public(part) and text:
            marks = [mark.id for mark in part.decorator_list if isinstance(mark, ast.Name)]
            head = part.name if "property" in marks else signature(source, part, part.name, True)
            head = " ".join(head.split())
            parts.append(f"**`{head}`**\n\n{in_markdown(text)}")
    return "\n\n".join(part for part in parts if part)


def reference() -> str:
    """Return docs/reference.md."""
    parts = [
        "# Library reference",
        "What the packages offer to programs, from their signatures and docstrings. In a checkout "
        "they are `network`, `data`, …; installed by pip they are parts of `glore` "
        "(`glore.network`, …). Shapes are written (batch, channels, [frames,] height, width).",
    ]
    contents = []
    for subject, modules in MODULES.items():
        links = ", ".join(f"[`{name}`](#{slug(name)})" for name in modules)
        contents.append(f"- {subject}: {links}")
    parts.append("\n".join(contents))
    for subject, modules in MODULES.items():
        parts.append(f"## {subject}")
        for module in modules:
            source = path_of(module).read_text(encoding="utf-8")
            head = in_markdown(ast.get_docstring(ast.parse(source)) or "")
            seen: set[str] = set()
            found = []
            for text, node, name in definitions(module):
                if name not in seen:
                    seen.add(name)
                    found.append(described(text, node, name))
            parts += [f"### {module}", head, *found]
    return NOTE + "\n\n".join(part for part in parts if part) + "\n"


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


# --- options --------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """Return a default as the command line would have it."""
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, tuple):
        return (
            "`"
            + ",".join(f"{part:.6g}" if isinstance(part, float) else str(part) for part in value)
            + "`"
        )
    return f"`{value}`"


def option_row(members: Options, field: dataclasses.Field) -> str:
    """Return an option's row of the page."""
    facts = field.metadata
    names = [flag_of(field.name)]
    names += [getattr(alias, "flag", alias) for alias in facts["aliases"]]
    text = facts["help"]
    if facts["choices"]:
        text += f" ({', '.join(map(str, facts['choices']))})"
    # A text that names the default is right on every machine.
    default = "" if "default:" in text else shown(getattr(members, field.name))
    cells = (", ".join(f"`{name}`" for name in names), default, text)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def own_defaults(job: JobOptions) -> list[str]:
    """Return ``--batch-size 32`` for the defaults that a command has and its groups have not."""
    found = []
    for members in job.groups().values():
        usual = type(members)()
        for field in dataclasses.fields(members):
            value = getattr(members, field.name)
            if value != getattr(usual, field.name):
                found.append(f"`{flag_of(field.name)}` {shown(value) or '(worked out)'}")
    return found


def options() -> str:
    """Return docs/options.md."""
    parts = [
        "# Options",
        "Every option of the commands that take `--config`, by group; `--help` prints the "
        "same. [configuration.md](configuration.md) says how the command line and a YAML file "
        "go together. Where a default is missing, the text says what it is, or it is empty.",
    ]
    groups: dict[type, str] = {}
    for command, (module, name) in COMMANDS.items():
        job = getattr(importlib.import_module(module), name)()
        members = job.groups()
        for key, group in members.items():
            groups.setdefault(type(group), key)
        links = ", ".join(
            f"[{key}](#{slug(type(group).__name__)})" for key, group in members.items()
        )
        parts += [f"## {command}", f"Groups: {links}."]
        own = own_defaults(job)
        if own:
            parts.append(f"Defaults of its own: {', '.join(own)}.")
    parts.append("## Groups")
    for group in groups:
        rows = ["| option | default | meaning |", "|---|---|---|"]
        members = group()
        rows += [option_row(members, field) for field in dataclasses.fields(members)]
        title = (group.__doc__ or "").splitlines()[0]
        parts += [f"### {group.__name__}", f"{plain(title)}", "\n".join(rows)]
    return NOTE + "\n\n".join(parts) + "\n"


# --- networks -------------------------------------------------------------------------------------


def networks() -> str:
    """Return docs/networks.md."""
    text = (DOCS / "networks.md").read_text(encoding="utf-8")
    start, rest = text.split(TABLE_START)
    _, end = rest.split(TABLE_END)
    table = summary.table(summary.list_networks())
    return f"{start}{TABLE_START}\n{table}\n{TABLE_END}{end}"


PAGES = {"networks.md": networks, "options.md": options, "reference.md": reference}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
