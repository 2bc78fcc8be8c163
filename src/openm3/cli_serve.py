"""The flags of `openm3 serve`."""

from __future__ import annotations

import argparse

from openm3.cli_options import Commands, add_precision, add_threads, command, positive, rate


def add_serve(commands: Commands) -> None:
    """One model behind HTTP."""
    parser = command(
        commands,
        "serve",
        "serve a model over HTTP, as OpenAI's, Anthropic's and MiniMax's clients expect",
        "openm3 serve",
        "openm3 serve path/to/checkpoint --port 9000 --cache-dir ~/.cache/openm3",
        "openm3 serve --host 0.0.0.0 --api-key-file keys.txt --name MiniMax-M3",
    )
    parser.add_argument(
        "path",
        metavar="MODEL",
        nargs="?",
        default="m3-tiny",
        help="checkpoint folder, or the bundled m3-tiny (default)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        action="append",
        help="what requests call the model (default: its folder's name); may be repeated, the first is the one shown",
    )
    clients = (
        "OpenAI's clients take OPENAI_BASE_URL=http://127.0.0.1:8000/v1, Anthropic's "
        "ANTHROPIC_BASE_URL=http://127.0.0.1:8000; `curl http://127.0.0.1:8000/v1/models` shows what is served."
    )
    _add_address(parser.add_argument_group("address and keys", clients))
    _add_limits(parser.add_argument_group("limits"))
    group = parser.add_argument_group("model and engine")
    group.add_argument("--device", metavar="NAME", default="cpu", help="where the model runs: cpu (default), or cuda")
    add_precision(parser)
    add_threads(parser)
    group.add_argument(
        "--max-requests", metavar="N", type=positive, default=64, help="requests in a step (default: 64); others wait"
    )
    group.add_argument(
        "--cache-tokens", metavar="N", type=positive, help="tokens in memory (default: half of what is free)"
    )
    group.add_argument("--cache-dir", metavar="DIR", help="keep what was read in this folder, for later servers too")
    group.add_argument("--files-dir", metavar="DIR", help="keep uploaded files here (default: until the server ends)")
    group.add_argument(
        "--allow-media-urls",
        action="store_true",
        help="fetch pictures and videos that requests name by http(s) address, from public addresses only (default: "
        "they come in the request, or as uploaded files)",
    )
    group.add_argument(
        "--media-workers",
        metavar="N",
        type=positive,
        default=1,
        help="processes that decode pictures and videos, started when the first comes (default: 1)",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged, as JSON lines (default: info, one a request)",
    )


def _add_address(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen (default: 127.0.0.1, this machine alone); other addresses need keys",
    )
    group.add_argument("--port", metavar="N", type=int, default=8000, help="0 for any that is free (default: 8000)")
    group.add_argument(
        "--api-key-file",
        metavar="PATH",
        help="a file of keys, one a line; clients need one of them (more: the variable OPENM3_API_KEYS)",
    )
    group.add_argument(
        "--allow-unauthenticated", action="store_true", help="serve other machines without keys: anybody may ask"
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        help="let web pages of this origin ask, '*' for all; may be repeated (default: none)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-tokens", metavar="N", type=positive, default=524288, help="longest reply to ask for (default: 524288)"
    )
    group.add_argument(
        "--max-concurrent", metavar="N", type=positive, default=256, help="HTTP requests at a time (default: 256)"
    )
    group.add_argument(
        "--max-body-mib", metavar="N", type=positive, default=64, help="longest request in MiB (default: 64)"
    )
    group.add_argument(
        "--max-file-mib", metavar="N", type=positive, default=512, help="longest uploaded file in MiB (default: 512)"
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=rate, help="end replies after this time, as they are (default: never)"
    )
    group.add_argument(
        "--grace",
        metavar="SECONDS",
        type=rate,
        default=30.0,
        help="when told to stop (SIGTERM, Ctrl-C), how long replies may take to end (default: 30); a second signal "
        "ends all at once",
    )
