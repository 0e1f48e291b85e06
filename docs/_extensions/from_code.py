"""Directives that print what the code says, so that pages cannot drift from it.

`command-line`            a section for each command of `llmq`, from its argparse parser
`python-source NAME`      the source of a public Python object, captioned with its file
`op-schema NAME …`        the schemas of ops in `torch.ops.llmq`
`returned-class NAME`     `autoclass` of what a public function returns
`example-scripts`         a section for each script of examples/: its docstring and its source
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


def found(name: str) -> Any:
    """Return the object that a dotted name stands for."""
    module, *attributes = name.split(".")
    thing: Any = importlib.import_module(module)
    for attribute in attributes:
        thing = getattr(thing, attribute)
    return thing


def code(text: str, language: str) -> nodes.literal_block:
    """Return `text` as a highlighted block."""
    return nodes.literal_block(text, text, language=language)


class PythonSource(SphinxDirective):
    """The source of an object, with the path of its file above."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        thing = found(self.arguments[0])
        path = Path(inspect.getsourcefile(thing) or "").resolve()
        self.env.note_dependency(str(path))
        block = code(textwrap.dedent(inspect.getsource(thing)), "python")
        container = nodes.container("", literal_block=True, classes=["literal-block-wrapper"])
        container += nodes.caption("", "", nodes.literal("", str(path.relative_to(ROOT))))
        container += block
        return [container]


class OpSchema(SphinxDirective):
    """Schemas of ops, one a line group."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        import torch

        import llmq.nn  # noqa: F401  (defines the ops)

        schemas = [
            str(getattr(torch.ops.llmq, name).default._schema) for name in self.arguments[0].split()
        ]
        wrapped = [textwrap.fill(s, 84, subsequent_indent="    ") for s in schemas]
        return [code("\n".join(wrapped), "text")]


class ReturnedClass(SphinxDirective):
    """`autoclass` of a function's return type, wherever that is defined."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        function = found(self.arguments[0])
        kind = typing.get_type_hints(function)["return"]
        lines = [
            "```{eval-rst}",
            f".. autoclass:: {kind.__module__}.{kind.__qualname__}",
            "   :members:",
            "   :no-undoc-members:",
            "```",
        ]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, "returned-class"), self.content_offset, node)
        return node.children


class CommandLine(SphinxDirective):
    """A section for each command: usage, arguments with their defaults, epilog."""

    _HIDDEN: ClassVar[tuple[Any, ...]] = (None, False, argparse.SUPPRESS)

    def run(self) -> list[nodes.Node]:
        from llmq import cli

        self.env.note_dependency(inspect.getsourcefile(cli) or "")
        parser = cli._parser()
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        helps = {choice.dest: choice.help for choice in commands._choices_actions}
        return [
            self._section(name, command, helps.get(name) or "")
            for name, command in commands.choices.items()
        ]

    def _section(self, name: str, parser: argparse.ArgumentParser, about: str) -> nodes.section:
        section = nodes.section(ids=[f"llmq-{name}"], names=[f"llmq {name}"])
        section += nodes.title("", "", nodes.literal("", f"llmq {name}"))
        about = parser.description or about
        section += nodes.paragraph("", about[:1].upper() + about[1:].rstrip(".") + ".")
        section += code(self._usage(parser), "text")
        for group in parser._action_groups:
            actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
            actions = [a for a in actions if a.help != argparse.SUPPRESS]
            if not actions:
                continue
            if len(parser._action_groups) > 2 and group.title:
                title = group.title[:1].upper() + group.title[1:]
                section += nodes.paragraph("", "", nodes.strong("", title))
            listing = nodes.definition_list(classes=["options"])
            for action in actions:
                listing += self._item(parser, action)
            section += listing
        if parser.epilog:
            section += code(parser.epilog, "text")
        return section

    @staticmethod
    def _usage(parser: argparse.ArgumentParser) -> str:
        formatter = argparse.HelpFormatter(parser.prog, width=78)
        formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, "")
        return formatter.format_help().strip()

    def _item(self, parser: argparse.ArgumentParser, action: argparse.Action) -> nodes.Node:
        name = action.metavar or action.dest
        if action.option_strings:
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            name = ", ".join(action.option_strings) + value
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        if action.choices:
            text += ("; " if text else "") + "one of " + ", ".join(map(str, action.choices))
        if action.default not in self._HIDDEN:
            text += ("; " if text else "") + f"default: {action.default}"
        return nodes.definition_list_item(
            "",
            nodes.term("", "", nodes.literal("", str(name))),
            nodes.definition("", nodes.paragraph("", text)),
        )


class ExampleScripts(SphinxDirective):
    """A section a script: what its docstring says, then the script."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for file in sorted((ROOT / "examples").glob("*.py")):
            self.env.note_dependency(str(file))
            text = file.read_text()
            tree = ast.parse(text)
            about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
            section = nodes.section(ids=[file.stem], names=[file.stem])
            section += nodes.title("", file.stem.replace("_", " ").capitalize())
            section += nodes.paragraph("", about)
            section += nodes.paragraph("", "", nodes.literal("", f"python examples/{file.name}"))
            start = tree.body[1].lineno - 1 if ast.get_docstring(tree) else 0
            section += code("\n".join(text.splitlines()[start:]), "python")
            sections.append(section)
        return sections


def setup(app: Any) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("command-line", CommandLine)
    app.add_directive("example-scripts", ExampleScripts)
    app.add_directive("python-source", PythonSource)
    app.add_directive("op-schema", OpSchema)
    app.add_directive("returned-class", ReturnedClass)
    return {"parallel_read_safe": True, "version": "1"}
