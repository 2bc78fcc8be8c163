"""The `openm3` command: what it accepts, and which module does the work.

Flags live here and, those of bench and serve, in cli_bench.py and cli_serve.py, so that `--help` imports neither torch
nor any room; a command's module is imported when the command runs. The exit code is the handler's, or 2 for a
deliberate error, 130 for Ctrl-C, 141 when the reader of the output went away.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from openm3 import __version__
from openm3.cli_bench import add_bench
from openm3.cli_options import Commands, add_json, add_model, add_precision, add_reply, add_threads, command, positive
from openm3.cli_serve import add_serve
from openm3.errors import OpenM3Error

HANDLERS = {
    "ask": "openm3.ask.command",
    "chat": "openm3.ask.chat",
    "serve": "openm3.server.command",
    "train": "openm3.train.command",
    "eval": "openm3.eval.command",
    "agree": "openm3.eval.agree",
    "bench": "openm3.eval.bench",
    "doctor": "openm3.ops.doctor",
    "inspect": "openm3.model.inspect",
}
"""The module behind each command. It has `run(args) -> int`; for inspect, `report(path)` and `render(report)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code. Raises SystemExit on misuse."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code = _run(args)
        sys.stdout.flush()
    except OpenM3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes standard output once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(HANDLERS[args.command])
    if args.command != "inspect":
        code: int = module.run(args)
        return code
    report = module.report(args.path)
    print(json.dumps(report, default=asdict) if args.json else module.render(report))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line: every command, flag, default and example."""
    parser = argparse.ArgumentParser(
        prog="openm3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="MiniMax Sparse Attention on every machine: ask, serve, train, measure and inspect M3 models.",
        epilog="Start here:\n"
        '  openm3 ask "What is the pass key for Ada?" --file notes.txt\n'
        "  openm3 doctor\n\n"
        "`openm3 COMMAND --help` shows a command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"openm3 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_ask(commands)
    _add_chat(commands)
    add_serve(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_agree(commands)
    add_bench(commands)
    _add_doctor(commands)
    _add_inspect(commands)
    return parser


def _add_ask(commands: Commands) -> None:
    parser = command(
        commands,
        "ask",
        "answer a question from long documents, with evidence, and from pictures and videos",
        'openm3 ask "What is the pass key for Ada?" --file notes.txt',
        'openm3 ask "Quote the line that defines main." --file src --file "docs/*.md" --cache ~/.cache/openm3',
        'git log -p | openm3 ask "Quote the line that defines main." --file - --json',
        'openm3 ask "What number is in the picture?" --image photo.jpg --model path/to/checkpoint',
        'openm3 ask "At which second does the light turn red?" --video clip.mp4 --file notes.txt',
    )
    parser.add_argument("question", metavar="QUESTION", help="what to ask, one argument")
    parser.add_argument(
        "--file",
        metavar="PATH",
        action="append",
        help="a file, folder or glob to read; '-' is standard input; may be repeated",
    )
    _add_media(parser)
    add_model(parser)
    add_precision(parser)
    add_reply(parser, max_new_tokens=128)
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep what was read in this folder: later questions about the same documents begin at once",
    )
    parser.add_argument(
        "--implementation", metavar="NAME", help="force one implementation of the operators, e.g. reference"
    )
    add_threads(parser)
    add_json(parser)


def _add_chat(commands: Commands) -> None:
    parser = command(
        commands,
        "chat",
        "talk to a model in the terminal",
        "openm3 chat",
        "openm3 chat --file notes.txt",
        "openm3 chat --model path/to/checkpoint",
    )
    parser.add_argument(
        "--file", metavar="PATH", action="append", help="a file, folder or glob to talk about; may be repeated"
    )
    _add_media(parser)
    add_model(parser)
    add_precision(parser)
    add_reply(parser, max_new_tokens=512)
    add_threads(parser)


def _add_media(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        metavar="PATH",
        action="append",
        help="a picture to look at: JPEG, PNG, GIF, WEBP or BMP; may be repeated. Pictures and videos stand before "
        "the files",
    )
    parser.add_argument(
        "--video",
        metavar="PATH",
        action="append",
        help="a video to look at, one frame a second: MP4, MOV, Matroska, WebM, AVI or an animation; may be repeated",
    )


def _add_train(commands: Commands) -> None:
    parser = command(
        commands,
        "train",
        "train a small M3 with its index branch",
        "openm3 train --out runs/tiny",
        "openm3 train --out runs/tiny --resume",
        "openm3 train --out runs/short --steps 20 --seed 1",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="runs/m3-tiny", help="checkpoint and log folder (default: runs/m3-tiny)"
    )
    parser.add_argument("--recipe", metavar="NAME", default="m3-tiny", help="what to train (default: m3-tiny)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest state in the output folder")
    parser.add_argument("--steps", metavar="N", type=positive, help="override the recipe's number of steps")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of weights and data (default: 0)")
    add_threads(parser)


def _add_eval(commands: Commands) -> None:
    parser = command(
        commands,
        "eval",
        "measure what a model finds at length and sees, what its selection covers, and what smaller weights lose",
        "openm3 eval needles --lengths 8192 32768 --count 20 --out runs/needles",
        "openm3 eval sight --count 50",
        "openm3 eval coverage --length 8192 --json",
        "openm3 eval quantisation",
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", title="tasks", required=True, help="what to measure")
    _add_needles(tasks)
    _add_sight(tasks)
    _add_coverage(tasks)
    _add_quantisation(tasks)


def _add_needles(tasks: Commands) -> None:
    parser = command(
        tasks,
        "needles",
        "ask for pass keys, quotes and what is absent in long held-out documents",
        "openm3 eval needles",
        "openm3 eval needles --lengths 8192 --count 20 --attention selected --out runs/short",
    )
    add_model(parser)
    add_precision(parser)
    parser.add_argument(
        "--lengths",
        metavar="N",
        type=positive,
        nargs="+",
        default=[32768, 131072],
        help="tokens of the documents (default: 32768 131072)",
    )
    parser.add_argument(
        "--count",
        metavar="N",
        type=positive,
        nargs="+",
        help="pass keys asked for, one number or one a length; half as many quotes and absences "
        "(default: 200 up to 65536 tokens, 50 above)",
    )
    parser.add_argument(
        "--attention",
        choices=("selected", "window"),
        nargs="+",
        default=["selected", "window"],
        help="the model's own selection, its newest blocks alone, or both on the same questions (default: both)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="runs/needles",
        help="results, table and heat map; a stopped run goes on from them (default: runs/needles)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of documents and questions (default: 0)")
    add_threads(parser)
    add_json(parser)


def _add_sight(tasks: Commands) -> None:
    parser = command(
        tasks,
        "sight",
        "ask what is in pictures and videos made from held-out fonts, photos and words, alone and amid long text",
        "openm3 eval sight",
        "openm3 eval sight --kinds number word --count 50 --needles 0",
    )
    add_model(parser)
    add_precision(parser)
    parser.add_argument(
        "--kinds",
        metavar="KIND",
        nargs="+",
        default=["number", "word", "colour", "shape", "count", "where", "minute"],
        help="what is asked for (default: number word colour shape count where minute)",
    )
    parser.add_argument("--count", metavar="N", type=positive, default=200, help="cases of each kind (default: 200)")
    parser.add_argument(
        "--lengths",
        metavar="N",
        type=positive,
        nargs="+",
        default=[65536],
        help="tokens of the texts that pictures stand in (default: 65536)",
    )
    parser.add_argument("--needles", metavar="N", type=int, default=20, help="pictures at each length (default: 20)")
    parser.add_argument(
        "--out", metavar="DIR", default="runs/sight", help="table and wrongly seen pictures (default: runs/sight)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the cases (default: 0)")
    add_threads(parser)
    add_json(parser)


def _add_coverage(tasks: Commands) -> None:
    parser = command(
        tasks,
        "coverage",
        "show the share of dense attention mass that the selected blocks hold, layer by layer",
        "openm3 eval coverage",
        "openm3 eval coverage --length 32768 --count 1 --json",
    )
    add_model(parser)
    add_precision(parser)
    parser.add_argument(
        "--length", metavar="N", type=positive, default=8192, help="tokens of each text (default: 8192)"
    )
    parser.add_argument("--count", metavar="N", type=positive, default=4, help="texts (default: 4)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of texts and tokens (default: 0)")
    add_threads(parser)
    add_json(parser)


def _add_quantisation(tasks: Commands) -> None:
    parser = command(
        tasks,
        "quantisation",
        "compare the model in bfloat16, int8 and MXFP8 with itself in float32, on held-out texts",
        "openm3 eval quantisation",
        "openm3 eval quantisation --length 2048 --count 1 --json",
    )
    add_model(parser)
    parser.add_argument(
        "--length", metavar="N", type=positive, default=4096, help="tokens of each text (default: 4096)"
    )
    parser.add_argument("--count", metavar="N", type=positive, default=8, help="texts (default: 8)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the texts (default: 0)")
    add_threads(parser)
    add_json(parser)


def _add_agree(commands: Commands) -> None:
    parser = command(
        commands,
        "agree",
        "compare a model with recorded outputs; exit 1 outside tolerance",
        "openm3 agree path/to/recorded",
        "openm3 agree path/to/recorded --model path/to/checkpoint --json",
    )
    parser.add_argument(
        "dir", metavar="DIR", help="folder with manifest.json and a safetensors file a case, or its parent"
    )
    parser.add_argument("--model", metavar="PATH", help="checkpoint to compare (default: the one recorded beside DIR)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where the model runs: cpu (default), or cuda")
    add_json(parser)


def _add_doctor(commands: Commands) -> None:
    parser = command(
        commands,
        "doctor",
        "show which implementation of each operator runs here, and why not the others",
        "openm3 doctor",
        "openm3 doctor --json",
    )
    add_json(parser)


def _add_inspect(commands: Commands) -> None:
    parser = command(
        commands,
        "inspect",
        "show a checkpoint's layers, parameters, memory and cost a token",
        "openm3 inspect m3-tiny",
        "openm3 inspect path/to/config.json --json",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint folder, its config.json, or m3-tiny")
    add_json(parser)
