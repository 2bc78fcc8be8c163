"""EleutherAI's harness measures a served model as it would measure the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm3.model.model import Model
from tests.e2e.programs import environment, find, run
from tests.e2e.questions import SOURCE

pytestmark = pytest.mark.e2e

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
"""
KINDS = {
    "choose": ("multiple_choice", 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'),
    "write": (
        "generate_until",
        'metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0}',
    ),
    "read": ("loglikelihood_rolling", "metric_list: [{metric: bits_per_byte}]"),
}

CODE = SOURCE.read_text()
CHOICES = ["(OpenM3Error):", "(OpenM3Error, ValueError):", "(Exception):"]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "choose": [
        {"context": f"{CODE}\n\nclass {name}", "choices": CHOICES, "target": right}
        for name, right in (("BusyError", 0), ("ConfigError", 1), ("OpenM3Error", 2))
    ],
    "write": [
        {"context": f"{CODE}\n\nclass {name}Error(", "target": "OpenM3Error):"} for name in ("Engine", "Busy", "Heron")
    ],
    "read": [{"context": "", "target": CODE[:1500]}],
}


@pytest.fixture(scope="module")
def samples(served: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the harness says of each document, by task."""
    program = find("OPENM3_E2E_LM_EVAL", "build/e2e/lm-eval/bin/lm_eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    for name, (kind, rest) in KINDS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[name]))
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"openm3_{name}", data=data, kind=kind) + rest)
    model = f"model=m3-tiny,base_url={served}/v1/completions,num_concurrent=2,max_length=4096"
    command: list[str | Path] = [program, "run", "--model", "local-completions", "--model_args", model]
    command += ["--batch_size", "2", "--tasks", ",".join(f"openm3_{name}" for name in KINDS)]
    env = environment(folder / "home", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    done = run([*command, "--include_path", folder, "--output_path", folder / "out", "--log_samples"], folder, env)
    assert done.returncode == 0
    found = {}
    for name in KINDS:
        (path,) = folder.rglob(f"samples_openm3_{name}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[name] = sorted(lines, key=lambda line: line["doc_id"])
    return found


def score(model: Model, ids: list[int], first: int) -> tuple[float, bool]:
    """How likely the ids from a place on are, and whether each is the likeliest."""
    logit_TV = model.logits(ids)[first - 1 : -1]
    own = logit_TV.log_softmax(-1)
    written = ids[first:]
    return sum(own[i, id_].item() for i, id_ in enumerate(written)), logit_TV.argmax(-1).tolist() == written


def test_choices_are_as_likely_as_the_model_holds_them(samples: dict[str, Any], model: Model) -> None:
    encode = model.tokenizer.encode
    best = []
    for sample, document in zip(samples["choose"], DOCUMENTS["choose"], strict=True):
        scores = []
        for (found,), choice in zip(sample["resps"], document["choices"], strict=True):
            ids = encode(document["context"] + choice)
            value, is_greedy = score(model, ids, len(encode(document["context"])))
            assert float(found[0]) == pytest.approx(value, abs=2e-3)
            assert found[1] == str(is_greedy)
            scores.append(value)
        best.append(scores.index(max(scores)) == document["target"])
        assert sample["acc"] == best[-1]
    assert any(best)


def test_replies_are_the_models_own(samples: dict[str, Any], model: Model) -> None:
    tokenizer = model.tokenizer
    for sample, document in zip(samples["write"], DOCUMENTS["write"], strict=True):
        ids = model.generate(tokenizer.encode(document["context"]), max_new_tokens=24, stop_ids=[tokenizer.eos_id])
        expected = tokenizer.decode(ids).partition("\n")[0]
        assert sample["resps"] == [[expected]]
    assert samples["write"][0]["resps"] == [["OpenM3Error):"]]


def test_a_text_is_as_likely_as_the_model_holds_it(samples: dict[str, Any], model: Model) -> None:
    (sample,) = samples["read"]
    tokenizer = model.tokenizer
    text = DOCUMENTS["read"][0]["target"]
    # The harness lets the begin token stand before the first one.
    value, _ = score(model, [tokenizer.bos_id, *tokenizer.encode(text)], 1)
    assert float(sample["resps"][0][0]) == pytest.approx(value, rel=1e-4)
