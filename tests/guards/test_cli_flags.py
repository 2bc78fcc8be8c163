"""Every flag is listed in cli_flags.txt, so that a new one is a decision and not an accident."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from openm3 import cli

LISTED = Path(__file__).with_name("cli_flags.txt")


def flags(parser: argparse.ArgumentParser, command: str) -> Iterator[str]:
    """One line an argument: command, option or metavar, allowed values, then default."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from flags(child, f"{command} {name}")
            continue
        words = [command, *(action.option_strings or [str(action.metavar or action.dest)])]
        words += ["{" + ",".join(map(str, action.choices)) + "}"] if action.choices else []
        words += [] if action.default in (None, argparse.SUPPRESS) else [f"= {action.default}"]
        yield " ".join(words)


def test_flags_are_listed() -> None:
    actual = list(flags(cli.build_parser(), "openm3"))
    assert actual == LISTED.read_text().splitlines(), "the list should be:\n" + "\n".join(actual)


def test_every_argument_has_help() -> None:
    for action in cli.build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            bare = [(name, a.dest) for name, child in action.choices.items() for a in child._actions if not a.help]
            assert bare == []
