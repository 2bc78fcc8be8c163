"""The flags of `openm3 bench`."""

from __future__ import annotations

import argparse

from openm3.cli_options import Commands, add_json, add_model, add_precision, add_threads, command, positive, rate


def add_bench(commands: Commands) -> None:
    """`bench` and its subjects."""
    parser = command(
        commands,
        "bench",
        "measure operators, a model, the engine or the server on this machine",
        "openm3 bench ops --quick",
        "openm3 bench model --json",
        "openm3 bench engine --workload chat",
        "openm3 bench serve --workload chat",
    )
    subjects = parser.add_subparsers(
        dest="subject", metavar="SUBJECT", title="subjects", required=True, help="what to measure"
    )
    _add_bench_ops(subjects)
    _add_bench_model(subjects)
    _add_bench_engine(subjects)
    _add_bench_serve(subjects)


def _add_bench_ops(subjects: Commands) -> None:
    parser = command(
        subjects,
        "ops",
        "time block selection and attention at M3's own geometry, case by case",
        "openm3 bench ops --quick --json",
        "openm3 bench ops --case select_1_behind_1m --against blocked",
        "openm3 bench ops --case 'served_*'",
        "openm3 bench ops --headline",
    )
    parser.add_argument(
        "--case",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="cases to time, by name or pattern (default: all but served_*)",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and time nothing")
    parser.add_argument("--quick", action="store_true", help="the five main cases, in less than 50 seconds")
    parser.add_argument(
        "--against", metavar="NAME", help="also time another implementation of the operators, e.g. blocked, in turns"
    )
    parser.add_argument(
        "--headline",
        action="store_true",
        help="time sparse against dense attention behind a million tokens: 15 GiB of memory and some minutes",
    )
    add_threads(parser)
    add_json(parser)


def _add_bench_model(subjects: Commands) -> None:
    parser = command(
        subjects,
        "model",
        "time a whole model: a chunk of 512 tokens behind a context, and decoding there",
        "openm3 bench model",
        "openm3 bench model --lengths 8192 131072 --dtype bfloat16",
        "openm3 bench model --config path/to/config.json --dtype bfloat16",
    )
    add_model(parser)
    add_precision(parser)
    parser.add_argument(
        "--config", metavar="PATH", help="a config.json to fill with random weights, instead of a checkpoint"
    )
    parser.add_argument(
        "--lengths",
        metavar="N",
        type=positive,
        nargs="+",
        default=[2048, 8192, 32768],
        help="tokens of context (default: 2048 8192 32768)",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="read every context through the model; otherwise the cache is filled with random keys and values",
    )
    add_threads(parser)
    add_json(parser)


def _add_bench_engine(subjects: Commands) -> None:
    parser = command(
        subjects,
        "engine",
        "serve loads of many requests: time to the first token and between tokens, cache hits, overhead",
        "openm3 bench engine",
        "openm3 bench engine --workload chat shared-8k --rate 8 --json",
    )
    _add_workloads(parser)
    parser.add_argument(
        "--draft-tokens", metavar="N", type=int, default=8, help="tokens proposed ahead from the text (default: 8)"
    )
    add_model(parser)
    add_precision(parser)
    add_threads(parser)
    add_json(parser)


def _add_bench_serve(subjects: Commands) -> None:
    parser = command(
        subjects,
        "serve",
        "serve the same loads over HTTP and by the engine alone, in turns: what HTTP takes of its throughput",
        "openm3 bench serve",
        "openm3 bench serve --workload chat --rate 8 --json",
        "openm3 bench serve --url http://127.0.0.1:8000",
    )
    _add_workloads(parser)
    parser.add_argument(
        "--batch", metavar="N", type=positive, default=16, help="replies at a time in the comparison (default: 16)"
    )
    parser.add_argument(
        "--written", metavar="N", type=positive, default=256, help="tokens of each of these replies (default: 256)"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=positive,
        default=5,
        help="turns of the comparison, whose median counts (default: 5)",
    )
    parser.add_argument(
        "--url",
        metavar="URL",
        help="load the server there with the workloads alone, with the first key of OPENM3_API_KEYS if it wants one; "
        "--model says whose tokens to send",
    )
    add_model(parser)
    add_precision(parser)
    add_threads(parser)
    add_json(parser)


def _add_workloads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        metavar="NAME",
        nargs="+",
        help="chat, shared-8k, shared-32k, agents, documents (default: all of them)",
    )
    parser.add_argument("--requests", metavar="N", type=positive, help="requests of each (default: its own number)")
    parser.add_argument("--rate", metavar="R", type=rate, help="requests a second (default: the workload's own rate)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of prompts and arrivals (default: 0)")
