"""The documentation: commands parse, links resolve, Python runs, tables are current.

A command is read by the option parser of its own job, which is stopped once it has parsed.
"""

import argparse
import ast
import functools
import importlib
import inspect
import re
import shlex
import sys

import generate
import pytest
import yaml

import glore_options
from dataset import list_datasets
from jobs.cli import COMMANDS
from network import get_symbol
from network.builder import get_spec

ROOT = generate.ROOT
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WRITTEN = [page for page in PAGES if page.name not in ("reference.md", "options.md")]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.S
)
# Programs that are not ours.
FOREIGN = {".", "apt-get", "cd", "docker", "export", "git", "nvidia-smi", "pip", "rm", "uv"}
UPSTREAM = "test/test-single-clip.py"


def ids(page):
    return str(page.relative_to(ROOT))


@functools.lru_cache
def blocks(page, kind):
    """Return (line number, text, reason not to run it or None) of a page's blocks of a kind."""
    content = page.read_text(encoding="utf-8")
    return [
        (content[: found.start("text")].count("\n"), found["text"], found["why"])
        for found in FENCE.finditer(content)
        if found["kind"] == kind
    ]


def without_code(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# --- commands -------------------------------------------------------------------------------------


class Parsed(Exception):
    """A command line was understood; ``values`` is what it gives."""

    def __init__(self, values):
        super().__init__()
        self.values = values


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Let no command do more than to parse its options."""
    for parser in (argparse.ArgumentParser, glore_options.Parser):

        def stop(self, args=None, namespace=None, parse=parser.parse_args):
            raise Parsed(parse(self, args, namespace))

        monkeypatch.setattr(parser, "parse_args", stop)


def commands(page):
    """Return the command lines of a page: those of its shell blocks, those in its text."""
    found, named = [], []
    for _, text, _ in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    for span in re.findall(
        r"`((?:python|glore|\./run_\w+\.sh|launch\.py) [^`]*)`", without_code(page)
    ):
        if "…" not in span and "..." not in span:
            named.append(shlex.split(span))
    return found, named


def job_of(words):
    """Return (module, its arguments) of one of our commands, or None for another's."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "./run_local.sh":
        return "jobs.train_kinetics", rest
    if program == "./run_dist.sh":
        return "jobs.launch", rest
    if program == "glore":
        return f"jobs.{COMMANDS[rest[0]][0]}", rest[1:]
    if [program, *rest[:2]] == ["python", "-m", "mxnet_compat"]:
        return "jobs.doctor", rest[2:]
    if program == "python" and rest[0] == "-m" and rest[1].split(".")[0] not in ("pip", "venv"):
        return rest[1].replace("glore.", "", 1), rest[2:]
    if program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
        name = "evaluate" if rest[0] == UPSTREAM else rest[0][:-3]
        return (f"jobs.{name}", rest[1:]) if "/" not in name else None
    if program == "./run_tests.sh":
        paths = [word for word in rest if word.startswith("test/")]
        assert all((ROOT / word.split("::")[0]).exists() for word in paths), rest
        return None
    if program == "sbatch":
        assert (ROOT / rest[0]).is_file(), rest
        return None
    assert program in FOREIGN or program == "python", f"what is {program}?"
    return None


def parsed(module, arguments, monkeypatch):
    """Return what a command's own parser makes of its arguments."""
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        main(arguments) if inspect.signature(main).parameters else main()
    except Parsed as result:
        return vars(result.values)
    except SystemExit as ending:
        if ending.code == 0:  # --help
            return {}
        raise AssertionError(f"exit code {ending.code}") from ending
    raise AssertionError(f"{module} parses no options")


def check_values(module, values):
    """Look up what a parser takes as mere text: networks, blocks, data sets."""
    name = values.get("network")
    if name is not None and not isinstance(name, list):
        get_spec(name)
    if module == "jobs.train_kinetics" and "dataset" in values:
        assert values["dataset"] in [*list_datasets(), "mine"]
    changes = {key: values[key] for key in ("glore", "block") if values.get(key) is not None}
    if changes and name and module in ("jobs.train_kinetics", "jobs.train_imagenet"):
        get_symbol(name, **changes)


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_commands_parse(page, stop_after_parsing, monkeypatch, capsys):
    failures = []
    found, named = commands(page)
    for words in [*found, *named]:
        rest = words
        while rest:
            try:
                job = job_of(rest)
                if job is None:
                    break
                module, arguments = job
                rest = []
                if module == "jobs.launch" and "--" in arguments:
                    rest = arguments[arguments.index("--") + 1 :]
                check_values(module, parsed(module, arguments, monkeypatch))
            except Exception as error:
                said = capsys.readouterr().err.strip()
                if words in named and "arguments are required" in said:
                    break  # a command that the text only names
                failures.append(f"{shlex.join(words)}\n    {said or error!r}")
                break
    assert not failures, "\n".join(failures)


def test_a_wrong_option_in_a_page_is_found(tmp_path, stop_after_parsing, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        parsed("jobs.train_kinetics", ["--netwrok", "RESNET50_GLORE"], monkeypatch)
    assert "--network" in capsys.readouterr().err


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_files_of_options_are_understood(page, tmp_path):
    for number, text, _ in blocks(page, "yaml"):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        options = importlib.import_module("jobs.options").KineticsOptions()
        glore_options.parse(options, ["--config", str(path)])
        assert options.given


# --- links ----------------------------------------------------------------------------------------


@functools.lru_cache
def anchors(page):
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.M):
        anchor, number = generate.slug(heading), 0
        while (f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    broken = []
    text = re.sub(r"`[^`\n]*`", "", without_code(page)) if page in WRITTEN else without_code(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_readme():
    linked, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        linked.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve()
            if file not in linked:
                todo.append(file)
    assert set(PAGES) <= linked


# --- Python ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_python_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, text, why in blocks(page, "python"):
        tree = ast.parse(text)
        if why:
            tree.body = [
                node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
            ]
        ast.increment_lineno(tree, number)
        exec(compile(tree, page, "exec"), names)


# --- what is generated, or repeats the code -------------------------------------------------------


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_generated_pages_are_current(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == generate.PAGES[name](), "run: python test/docs/generate.py"
    assert str(ROOT) not in page


def table(text, first):
    """Return the rows of the table whose first column is ``first``: name to cells by column."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    header, _, *rows = cells
    return {row[0]: dict(zip(header, row)) for row in rows}


def test_readme_is_a_front_door():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    networks = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    shown, rows = table(readme, "network"), table(networks, "network")
    assert len(shown) == 10
    for name, row in shown.items():
        assert row == {column: rows[name][column] for column in row}


@functools.lru_cache
def texts():
    """Return every text of the code and the scripts, … in place of values."""
    found = []
    for path in sorted(ROOT.glob("*/**/*.py")) + sorted(ROOT.glob("*.py")):
        if path.relative_to(ROOT).parts[0] in (".venv", "test", "build"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said = [
                str(part.value) if isinstance(part, ast.Constant) else "…"
                for part in parts
                if isinstance(part, (ast.Constant, ast.FormattedValue))
            ]
            if said:
                found.append(re.sub(r"%(\.\d+)?[sdgf]", "…", " ".join("".join(said).split())))
    shell = [
        " ".join(path.read_text().replace('" \\', "").replace('"', "").split())
        for path in ROOT.glob("*.sh")
    ]
    return found + shell


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")]
    assert len(messages) > 20
    unknown = [
        message
        for message in messages
        if not any(" ".join(message.split()) in text for text in texts())
    ]
    assert not unknown


def test_citation_file_is_complete():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["license"] == "MIT"
    assert content["preferred-citation"]["title"] == "Graph-Based Global Reasoning Networks"
