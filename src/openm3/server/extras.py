"""What this server tells beside every protocol, under `openm3`: which blocks a reply read, and its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from openm3.server.calls import Event, Finished, Looked
from openm3.server.evidence import report


class Extras(BaseModel):
    """What this server tells beside the protocol: evidence, as `openm3 ask --json` has it, and what it cost.

    `ids` are the reply's tokens, and `blocks` what each layer's groups read for them.
    """

    evidence: list[dict[str, Any]] = []
    no_evidence: str | None = None
    attended_share: float | None = None
    tokens: dict[str, int] = {}
    timings: dict[str, float | None] = {}
    ids: list[int] = []
    blocks: list[list[list[list[int]]]] = []


def extra(event: Event) -> dict[str, Any]:
    """What an event tells beside the protocol: mostly nothing."""
    match event:
        case Looked(ids, blocks):
            return {"ids": ids, "blocks": blocks}
        case Finished():
            return report(event) or {}
    return {}


def joined(extras: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All that was told, in one: ids and blocks are added up, all else is told once."""
    whole: dict[str, Any] = {}
    for key, value in (item for told in extras for item in told.items()):
        if key in ("ids", "blocks"):
            whole.setdefault(key, []).extend(value)
        else:
            whole[key] = value
    return whole
