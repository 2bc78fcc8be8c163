"""What the commands of the command line have in common: their form, and flags that mean the same everywhere."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(commands: Commands, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    """A command with its examples below its options."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint."""
    parser.add_argument(
        "--model", metavar="PATH", default="m3-tiny", help="checkpoint folder, or the bundled m3-tiny (default)"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """What weights and cache are kept in."""
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="float32", help="of weights and cache (default: float32)"
    )
    parser.add_argument(
        "--weights",
        choices=("int8", "int8-channel"),
        help="keep the layers' weights in one byte each, with a scale for every 32 inputs or one an output",
    )


def add_reply(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How long an answer gets, and whether the model thinks."""
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=positive,
        default=max_new_tokens,
        help=f"longest answer (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--thinking",
        choices=("adaptive", "enabled", "disabled"),
        default="disabled",
        help="whether the model thinks before it answers (default: disabled)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """How many CPU threads."""
    parser.add_argument("--threads", metavar="N", type=positive, help="CPU threads (default: PyTorch's choice)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Output for programs."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def rate(text: str) -> float:
    """A positive number, as an argument's type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def positive(text: str) -> int:
    """A positive whole number, as an argument's type."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
