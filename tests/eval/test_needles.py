"""Questions are asked as if each prompt were read whole, the window is one, and a stopped run goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openm3 import cli
from openm3.errors import ConfigError
from openm3.eval import needles
from openm3.eval.command import render, shares
from openm3.eval.haystack import Counts, HaystackMaker
from openm3.eval.heatmap import by_depth, draw
from openm3.eval.needles import Plan, Reader, Result, Store, ask, fingerprint, limit_to_window, score
from openm3.model.model import Model, load
from openm3.model.network import Network
from openm3.train.corpus import Source

PNG = b"\x89PNG\r\n\x1a\n"
PLAN = Plan((1024, 1300), (12, 4))


@pytest.fixture(autouse=True)
def _few_sources(monkeypatch: pytest.MonkeyPatch, sources: list[Source]) -> None:
    monkeypatch.setattr("openm3.eval.haystack.standard_library", lambda held_out: sources)


def result(**changes: object) -> Result:
    base = Result("selected", 32768, 0, "pass_key", "Q?", "A.", "A.", True, True, 0.55, "a.py")
    return replace(base, **changes)  # type: ignore[arg-type]


def test_plan_spreads_questions_over_haystacks() -> None:
    readings = list(Plan((32768, 131072), (25, 10), ("selected", "window")).readings())
    assert readings[:2] == [(32768, 0, Counts(10, 5, 5), "selected"), (32768, 0, Counts(10, 5, 5), "window")]
    assert readings[4:] == [
        (32768, 2, Counts(5, 3, 3), "selected"),
        (32768, 2, Counts(5, 3, 3), "window"),
        (131072, 0, Counts(10, 5, 5), "selected"),
        (131072, 0, Counts(10, 5, 5), "window"),
    ]


def test_reader_answers_as_generate_does(model: Model) -> None:
    haystack = HaystackMaker(model.tokenizer, 0).make(700, 0, Counts(3, 1, 1))
    prompts = [haystack.prompt(model.tokenizer, asked.question.text) for asked in haystack.asked]
    reader = Reader(model.network, max(map(len, prompts)) + 6)
    read: list[int] = []
    for ids in [*prompts, prompts[0]]:
        expected = list(model.generate(ids, max_new_tokens=6))
        assert reader.answer(ids, limit=6, stop_id=-1, on_progress=read.append) == expected
        assert reader.answer(ids, limit=6, stop_id=expected[3]) == expected[: expected.index(expected[3])]
    assert read == [len(ids) for ids in [*prompts, prompts[0]]]


def test_window_is_the_newest_blocks(model: Model) -> None:
    window = limit_to_window(model.network)
    ids = torch.randint(model.config.vocab_size, (900,)).tolist()
    for block_TGK in Model(window, model.tokenizer, "window").trace(ids).blocks.values():
        own_T = np.arange(900) // 128
        expected_TK = np.stack((np.maximum(own_T - 1, 0), np.where(own_T > 0, own_T, -1)), axis=1)
        np.testing.assert_array_equal(block_TGK, np.repeat(expected_TK[:, None], 2, axis=1))
    assert model.network.config.num_local == 1
    for ours, theirs in zip(window.parameters(), model.network.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_window_of_a_quantised_model(folder: Path) -> None:
    model = load(folder, weights="int8")
    window = limit_to_window(model.network)
    for name, value in model.network.state_dict().items():
        assert window.state_dict()[name].data_ptr() == value.data_ptr()
    ids = torch.randint(model.config.vocab_size, (200,)).tolist()
    assert Model(window, model.tokenizer, "window").logits(ids).equal(model.logits(ids))


def test_fingerprint_tells_dtypes_apart(folder: Path, model: Model) -> None:
    same, coded = load(folder), load(folder, weights="int8")
    assert fingerprint(same.network) == fingerprint(model.network) != fingerprint(coded.network)


def test_window_needs_sparse_layers(model: Model) -> None:
    config = replace(model.config, layer_types=("full", "sparse"))
    with pytest.raises(ConfigError, match="the model has dense attention layers"):
        limit_to_window(Network(config))


@pytest.mark.parametrize(
    ("kind", "expected", "answer", "scored"),
    [
        ("pass_key", "The pass key for a b is 123.", "The pass key for a b is 123.", (True, True)),
        ("pass_key", "The pass key for a b is 123.", "The pass key for a c is 123.", (False, True)),
        ("pass_key", "The pass key for a b is 123.", "The pass key for a b is 1123.", (False, False)),
        ("quote", "The line that defines f is def f():", "The line that defines f is def f():", (True, False)),
        ("quote", "The line that defines f is def f():", "The line that defines f is def f(a):", (False, False)),
        ("absence", "The pass key for a is not there.", "The pass key for b is not there.", (True, False)),
        ("absence", "The pass key for a is not there.", "The pass key for a is 17.", (False, False)),
    ],
)
def test_score(kind: str, expected: str, answer: str, scored: tuple[bool, bool]) -> None:
    assert score(kind, expected, answer) == scored


def test_asks_everything_and_goes_on_after_a_stop(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(model, PLAN, Store(tmp_path / "whole", model, 0))
    asked = Counter((r.length, r.attention, r.kind) for r in whole)
    assert {asked[1024, attention, "pass_key"] for attention in ("selected", "window")} == {12}
    assert {asked[length, "window", "absence"] for length in (1024, 1300)} == {6, 2}
    selected = [(r.haystack, r.question, r.expected) for r in whole if r.attention == "selected"]
    assert selected == [(r.haystack, r.question, r.expected) for r in whole if r.attention == "window"]

    read = 0

    def stop_in_the_third(tokens: int) -> None:
        nonlocal read
        read += tokens
        if read > 2500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, PLAN, Store(tmp_path / "part", model, 0), on_progress=stop_in_the_third)
    kept = json.loads((tmp_path / "part/results.json").read_text())["results"]
    assert [Result(**r) for r in kept] == [r for r in whole if (r.length, r.haystack) == (1024, 0)]
    assert ask(model, PLAN, Store(tmp_path / "part", model, 0)) == whole

    monkeypatch.setattr(needles, "_ask_haystack", None)
    progress: list[int] = []
    assert ask(model, PLAN, Store(tmp_path / "part", model, 0), on_progress=progress.append) == whole
    assert progress == [1024] * 4 + [1300] * 2


def test_store_refuses_what_it_cannot_go_on_from(model: Model, tmp_path: Path) -> None:
    Store(tmp_path, model, 0).add([result()])
    with pytest.raises(ConfigError, match="holds results of another model or seed: give another --out"):
        Store(tmp_path, model, 1)
    other = Network(model.config)
    with pytest.raises(ConfigError, match="another model or seed"):
        Store(tmp_path, Model(other, model.tokenizer, "other"), 0)
    (tmp_path / "results.json").write_text('{"results": [{}]}')
    with pytest.raises(ConfigError, match="does not hold results that can be gone on from"):
        Store(tmp_path, model, 0)


def test_store_asks_again_when_more_is_wanted(model: Model, tmp_path: Path) -> None:
    store = Store(tmp_path, model, 0)
    store.add([result(), result(kind="quote")])
    assert store.find("selected", 32768, 0, Counts(2, 1, 1)) is None
    store.add([result(), result(), result(kind="quote")])
    found = Store(tmp_path, model, 0).find("selected", 32768, 0, Counts(2, 1, 1))
    assert found is not None and len(found) == 3


def test_shares_and_tables() -> None:
    results = [result(depth=i / 20, right=i > 0) for i in range(20)] + [
        result(kind="absence", depth=None, attention=attention, right=attention == "selected")
        for attention in ("selected", "window")
    ]
    rows = {(r["kind"], r["attention"]): r for r in shares(results)}
    assert (rows["pass_key", "selected"]["right"], rows["digits", "selected"]["right"]) == (19, 20)
    assert rows["pass_key", "selected"]["low"] == pytest.approx(0.764, abs=1e-3)
    assert ("pass_key", "window") not in rows
    lines = render(results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["32K", "pass keys", "19 of 20, 95.0% (76% to 99%)", ""]
    assert cells[4] == ["32K", "absence", "1 of 1, 100.0% (21% to 100%)", "0 of 1, 0.0% (0% to 79%)"]
    assert cells[10] == ["0-10%", "1 of 2", ""]


def test_depth_buckets() -> None:
    results = [result(depth=d, right=d < 0.5) for d in (0.0, 0.099, 0.1, 0.95, 1.0)] + [result(kind="quote")]
    assert by_depth(results, "pass_key", "selected", 32768) == [(2, 2), (1, 1), *[(0, 0)] * 7, (0, 2)]


def test_heat_map_is_a_picture(tmp_path: Path) -> None:
    results = [result(depth=i / 30, right=i % 2 == 0, length=n) for i in range(30) for n in (32768, 131072)]
    draw(results, tmp_path / "one.png")
    draw([*results, *(replace(r, attention="window", kind="quote") for r in results)], tmp_path / "four.png")
    one, four = (tmp_path / "one.png").read_bytes(), (tmp_path / "four.png").read_bytes()
    assert one.startswith(PNG) and four.startswith(PNG)
    # Four panels are twice as high and nearly twice as wide as one.
    assert int.from_bytes(four[16:20]) > 1.5 * int.from_bytes(one[16:20])
    assert int.from_bytes(four[20:24]) > 1.5 * int.from_bytes(one[20:24])


def test_missing_matplotlib_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["eval", "needles", "--out", str(tmp_path)]) == 2
    assert "needs matplotlib: pip install 'openm3[eval]'" in capsys.readouterr().err


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "needles", "--model", str(folder), "--lengths", "1024", "--count", "2", "--out", str(tmp_path)]
    assert cli.main([*line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(s["kind"], s["attention"], s["asked"]) for s in values["shares"]] == [
        *(("pass_key", "selected", 2), ("pass_key", "window", 2)),
        *(("digits", "selected", 2), ("digits", "window", 2)),
        *(("quote", "selected", 1), ("quote", "window", 1)),
        *(("absence", "selected", 1), ("absence", "window", 1)),
    ]
    assert values["results"] == str(tmp_path / "results.json")
    assert Path(values["picture"]).read_bytes().startswith(PNG)
    assert cli.main(line) == 0
    assert capsys.readouterr().out.startswith((tmp_path / "needles.md").read_text().rstrip())


def test_ctrl_c_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(needles, "_ask_haystack", stop)
    assert cli.main(["eval", "needles", "--model", str(folder), "--lengths", "1024", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there\ninterrupted\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lengths", "1024", "--count", "1", "2"],
            "--count takes one number, or one for each of the 1 lengths, not 2",
        ),
        (["--lengths", "100"], "at least 512 tokens, not 100"),
        (["--lengths", "2000000"], "exceed the model's limit of 1048576"),
        (["--model", "nowhere"], "no checkpoint folder at nowhere"),
    ],
)
def test_misuse_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["eval", "needles", "--model", str(folder), "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
