"""Reads and writes the published checkpoint layout: safetensors under the published tensor names.

`layout` is the one table of names, used in both directions. Everything is checked against the file headers before a
single weight is read. Any tensor may be stored in MXFP8, with its scales beside it. This module builds no network.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openm3.config import ModelConfig
from openm3.errors import CheckpointError
from openm3.model import mxfp8
from openm3.model.layout import Param, Part, layout
from openm3.ops.linear import Weight, quantise

BUNDLED = {"m3-tiny": Path(__file__).parent.parent / "assets" / "m3-tiny"}
"""Checkpoints inside the package, by name."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_IGNORED = re.compile(r"(^|\.)mtp\.")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# A file is mapped anew after this many bytes, so that pages already copied do not pile up in resident memory.
_MAPPED_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header describes it; `dtype` in safetensors' spelling, such as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_into(params: Mapping[str, Weight], folder: str | Path, config: ModelConfig) -> None:
    """Fill `params` (by `layout`'s names, any dtype and device, or quantised) from the checkpoint in `folder`.

    Holds no more than one tensor beside `params`. Vision and projector parameters may be left out of `params`; their
    tensors are checked all the same. Raises CheckpointError, as `check` does, before it changes anything; for values
    that cannot be quantised, when it meets them.
    """
    stored = check(folder, config)
    table = {param.name: param for param in layout(config)}
    unfilled = {name for name in table if not _is_media(name)} ^ {name for name in params if not _is_media(name)}
    assert not unfilled, f"the model's parameters and the layout differ: {', '.join(fold(unfilled))}"
    wanted: dict[Path, list[tuple[Part, Weight]]] = defaultdict(list)
    for name, target in params.items():
        assert target.shape == table[name].shape, f"parameter {name} must have shape {table[name].shape}"
        for part in table[name].parts:
            wanted[stored[part.name].file].append((part, target))
    for file, pairs in wanted.items():
        for run in _runs(pairs):
            with _opened(file) as tensors, torch.no_grad():
                for part, target in run:
                    _fill(target, part, _value(part.name, tensors, stored))


def _value(name: str, tensors: Any, stored: Mapping[str, Stored]) -> Tensor:
    """A tensor of an open file, in float32 if it is MXFP8; its scales may be in another file."""
    value: Tensor = tensors.get_tensor(name)
    scale = name + mxfp8.SCALE_SUFFIX
    if scale not in stored:
        return value
    if stored[scale].file == stored[name].file:
        return mxfp8.decode(value, tensors.get_tensor(scale))
    with _opened(stored[scale].file) as others:
        return mxfp8.decode(value, others.get_tensor(scale))


def _fill(target: Weight, part: Part, value: Tensor) -> None:
    if isinstance(target, Tensor):
        target[part.where].copy_(value)
        return
    room = target.at(part.where)
    try:
        quantised = quantise(value, value.shape[-1] // room.scale.shape[-1])
    except ValueError as error:
        raise CheckpointError(f"{part.name}: {error}") from None
    room.code.copy_(quantised.code)
    room.scale.copy_(quantised.scale)


def read(
    folder: str | Path, config: ModelConfig, *, dtype: torch.dtype | None = None, vision: bool = False
) -> dict[str, Tensor]:
    """Read a checkpoint as a dict of parameters: as stored (MXFP8 as float32), or in `dtype` (the router's: float32).

    Raises CheckpointError, as `check` does.
    """
    stored = check(folder, config)
    params: dict[str, Tensor] = {}
    for param in layout(config):
        if vision or not _is_media(param.name):
            wanted = torch.float32 if param.float32 else dtype or _widest(stored[part.name] for part in param.parts)
            params[param.name] = torch.empty(param.shape, dtype=wanted)
    load_into(params, folder, config)
    return params


def check(folder: str | Path, config: ModelConfig) -> dict[str, Stored]:
    """Compare the headers of the files in `folder` with what `config` needs; return its tensors by published name.

    A tensor of dtype F8_E4M3 needs its scales beside it. Tensors under `mtp.` are ignored. Raises one CheckpointError
    that names every file that is missing or torn, or else every tensor that is missing, unexpected, of a wrong shape or
    of a dtype that cannot be read. Names that differ only in numbers are folded: `layers.{3-59}.norm.weight`.
    """
    stored = _survey(Path(folder))
    needed = {part.name: part.shape for param in layout(config) for part in param.parts}
    coded = {name for name in needed.keys() & stored.keys() if stored[name].dtype == mxfp8.DTYPE}
    scales = {name + mxfp8.SCALE_SUFFIX: mxfp8.scale_shape(needed[name]) for name in coded}
    needed |= scales
    problems: list[str] = []
    if missing := needed.keys() - stored.keys():
        problems.append("missing " + ", ".join(fold(missing)))
    if unexpected := stored.keys() - needed.keys():
        problems.append("unexpected " + ", ".join(fold(unexpected)))
    wrong: dict[str, set[str]] = defaultdict(set)
    for name in needed.keys() & stored.keys():
        tensor = stored[name]
        if tensor.shape != needed[name]:
            wrong[f"has shape {list(tensor.shape)} instead of {list(needed[name])}"].add(name)
        readable = mxfp8.SCALE_DTYPES if name in scales else (*_DTYPES, mxfp8.DTYPE)
        if tensor.dtype not in readable:
            wrong[f"has dtype {tensor.dtype} instead of {', '.join(readable)}"].add(name)
    problems += sorted(f"{', '.join(fold(names))} {what}" for what, names in wrong.items())
    if problems:
        raise CheckpointError(f"the checkpoint in {folder} does not fit its config: " + "; ".join(problems))
    return {name: stored[name] for name in needed}


def has_weights(folder: str | Path) -> bool:
    """Tell whether `folder` holds weight files at all, whole or torn."""
    return (Path(folder) / _INDEX).exists() or any(Path(folder).glob("*.safetensors"))


def _survey(folder: Path) -> dict[str, Stored]:
    """Every tensor in the files of a checkpoint, from their headers."""
    stored: dict[str, Stored] = {}
    problems: list[str] = []
    for file in _files(folder):
        try:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if _IGNORED.search(name):
                        continue
                    if name in stored:
                        problems.append(f"{name} is in both {stored[name].file.name} and {file.name}")
                    header = tensors.get_slice(name)
                    stored[name] = Stored(file, tuple(header.get_shape()), str(header.get_dtype()))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return stored


def _files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: the single one, or those that the index names."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise CheckpointError(f"no weights in {folder}: there is neither {_SINGLE} nor {_INDEX}")
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not readable JSON: {error}") from None
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not (isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())):
        raise CheckpointError(f"{index} must hold a weight_map from tensor names to file names")
    shards = sorted(set(names.values()))
    if outside := [name for name in shards if name in ("", "..") or PurePath(name).name != name]:
        raise CheckpointError(f"{index} may only name files beside it, not {', '.join(map(repr, outside))}")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise CheckpointError(f"files named by {index} are missing: {', '.join(map(repr, missing))}")
    return [folder / name for name in shards]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is torn or not a safetensors file: {error}") from None


def _runs(pairs: list[tuple[Part, Weight]]) -> Iterator[list[tuple[Part, Weight]]]:
    """Cut the work on one file into runs of at most `_MAPPED_BYTES`, or one tensor."""
    run: list[tuple[Part, Weight]] = []
    size = 0
    for part, target in pairs:
        part_bytes = math.prod(part.shape) * torch.float32.itemsize
        if run and size + part_bytes > _MAPPED_BYTES:
            yield run
            run, size = [], 0
        run.append((part, target))
        size += part_bytes
    yield run


def _is_media(name: str) -> bool:
    return name.startswith(("vision.", "projector."))


def _widest(stored: Iterable[Stored]) -> torch.dtype:
    dtypes = {_DTYPES.get(tensor.dtype, torch.float32) for tensor in stored}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def fold(names: Iterable[str]) -> list[str]:
    """Fold dotted names that differ only in one number: `a.0.b`, `a.1.b` and `a.2.b` become `a.{0-2}.b`; sorted."""
    rows = {tuple(name.split(".")) for name in names}
    for place in reversed(range(max(map(len, rows), default=0))):
        numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
        folded: set[tuple[str, ...]] = set()
        for row in rows:
            if place < len(row) and re.fullmatch(r"0|[1-9]\d{0,8}", row[place], re.ASCII):
                numbers[row[:place], row[place + 1 :]].append(int(row[place]))
            else:
                folded.add(row)
        for (head, tail), found in numbers.items():
            text = str(found[0]) if len(found) == 1 else "{" + ranges(found) + "}"
            folded.add((*head, text, *tail))
        rows = folded
    return sorted(".".join(row) for row in rows)


def ranges(numbers: Iterable[int]) -> str:
    """Write whole numbers compactly: 0, 1, 2, 5 becomes "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def write(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `config.json` and the weights in the published layout, in files of at most `max_shard_bytes`.

    `params` holds every parameter of `layout(config)`; they are stored as they are, or in `dtype` (the router's stay
    float32). The same input gives the same bytes. Everything is written under temporary names and then renamed, and the
    weight files of an older checkpoint in `folder` are removed. Raises CheckpointError.
    """
    folder = Path(folder)
    table = list(layout(config))
    _refuse_params(table, params)
    stored = {param.name: torch.float32 if param.float32 else dtype or params[param.name].dtype for param in table}
    shards = _shards(table, stored, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [_SINGLE] if len(shards) == 1 else names
    new: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            new.append(name)
            tensors = {
                part.name: params[param.name].detach()[part.where].to("cpu", stored[param.name]).contiguous()
                for param, part in shard
            }
            save_file(tensors, _temporary(folder, name), metadata={"format": "pt"})
            # The library makes files that only their owner can read.
            _temporary(folder, name).chmod(0o644)
        if len(shards) > 1:
            new.append(_INDEX)
            _write_json(_temporary(folder, _INDEX), _index(shards, names, stored))
        new.append("config.json")
        main = str(stored["embed.weight"]).removeprefix("torch.")
        _write_json(_temporary(folder, "config.json"), {**config.to_hf(), "torch_dtype": main})
        for name in new:
            _temporary(folder, name).replace(folder / name)
        for old in folder.iterdir():
            if old.name not in new and (old.name in (_SINGLE, _INDEX) or _SHARD.fullmatch(old.name)):
                old.unlink()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from None
    finally:
        for name in new:
            _temporary(folder, name).unlink(missing_ok=True)


def _refuse_params(table: list[Param], params: Mapping[str, Tensor]) -> None:
    needed = {param.name: param.shape for param in table}
    problems: list[str] = []
    if missing := needed.keys() - params.keys():
        problems.append("missing " + ", ".join(fold(missing)))
    if unexpected := params.keys() - needed.keys():
        problems.append("unexpected " + ", ".join(fold(unexpected)))
    for name in sorted(needed.keys() & params.keys()):
        if params[name].shape != needed[name]:
            problems.append(f"{name} has shape {list(params[name].shape)} instead of {list(needed[name])}")
        if params[name].dtype not in _DTYPES.values():
            problems.append(f"{name} has dtype {params[name].dtype}, not float32, bfloat16 or float16")
    if problems:
        raise CheckpointError("the parameters do not fit the config: " + "; ".join(problems))


def _shards(table: list[Param], stored: Mapping[str, torch.dtype], limit: int) -> list[list[tuple[Param, Part]]]:
    shards: list[list[tuple[Param, Part]]] = [[]]
    size = 0
    for param in table:
        for part in param.parts:
            part_bytes = math.prod(part.shape) * stored[param.name].itemsize
            if shards[-1] and size + part_bytes > limit:
                shards.append([])
                size = 0
            shards[-1].append((param, part))
            size += part_bytes
    return shards


def _index(
    shards: list[list[tuple[Param, Part]]], names: list[str], stored: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    sizes = (math.prod(part.shape) * stored[param.name].itemsize for shard in shards for param, part in shard)
    where = {part.name: name for name, shard in zip(names, shards, strict=True) for _, part in shard}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
