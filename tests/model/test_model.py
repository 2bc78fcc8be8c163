"""A loaded model: the recorded logits, cached against uncached, traces, and one clear error for everything wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import openm3
from openm3 import cli
from openm3.config import ModelConfig
from openm3.errors import CheckpointError, ConfigError, PromptError
from openm3.model import checkpoint
from openm3.model.batch import Batch
from openm3.model.model import Model, load
from openm3.model.network import Network
from openm3.tokens.media import Media

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
IDS = load_file(GOLDEN / "golden/long.safetensors")["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def recorded() -> Model:
    return load(GOLDEN / "model")


@pytest.fixture(scope="module")
def sparse(recorded: Model) -> Model:
    """Every layer sparse and a mixture of experts, random."""
    config = replace(recorded.config, layer_types=("sparse",) * 3, mlp_types=("moe",) * 3, vision=None, num_selected=3)
    network = Network(config)
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
    return Model(network, recorded.tokenizer, "sparse")


def test_logits_and_trace_of_a_recorded_case(recorded: Model) -> None:
    case = load_file(GOLDEN / "golden/edge257.safetensors")
    ids = case["input_ids"][0].tolist()
    logit_TV = recorded.logits(ids)
    assert (logit_TV.shape, logit_TV.dtype) == ((257, 320), torch.float32)
    assert (logit_TV - case["logits"][0]).abs().max() < 2e-5
    blocks = recorded.trace(ids).blocks
    assert blocks.keys() == {1, 2, 3}
    for layer, block_TGK in blocks.items():
        expected = np.sort(case[f"blocks.{layer}"][0].transpose(0, 1).numpy() % 99, axis=-1)
        np.testing.assert_array_equal(np.sort(block_TGK % 99, axis=-1), expected)


def test_reference_gives_the_same_logits(recorded: Model) -> None:
    plain = recorded.logits(IDS[:700])
    with openm3.use("reference"):
        assert (recorded.logits(IDS[:700]) - plain).abs().max() < 1e-5


def test_float64_is_closer_to_itself_than_float32(recorded: Model) -> None:
    wide = load(GOLDEN / "model", dtype=torch.float64)
    assert wide.network.embed.weight.dtype == torch.float64
    error = (wide.logits(IDS[:400]) - recorded.logits(IDS[:400])).abs().max()
    assert 0 < error < 2e-5


def test_bfloat16_keeps_the_router_wide() -> None:
    narrow = load(GOLDEN / "model", dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in narrow.network.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"layers.{layer}.mlp.router.{leaf}" for layer in (1, 2, 3) for leaf in ("weight", "bias")
    }
    assert narrow.logits(IDS[:300]).dtype == torch.float32
    assert len(list(narrow.generate(IDS[:300], max_new_tokens=3))) == 3


@pytest.mark.parametrize("name", ["recorded", "sparse"])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 513])
def test_generate_is_repeated_argmax(request: pytest.FixtureRequest, name: str, length: int) -> None:
    model: Model = request.getfixturevalue(name)
    ids = IDS[:length]
    made = list(model.generate(ids, max_new_tokens=8))
    for i, token in enumerate(made):
        assert token == int(model.logits(ids + made[:i])[-1].argmax())
    assert len(made) == 8


def test_generate_ends_before_a_stop(recorded: Model) -> None:
    made = list(recorded.generate(IDS[:50], max_new_tokens=12))
    assert list(recorded.generate(IDS[:50], max_new_tokens=12, stop_ids=[made[5]])) == made[: made.index(made[5])]
    assert list(recorded.generate(IDS[:50], max_new_tokens=0)) == []


@pytest.mark.parametrize("name", ["recorded", "sparse"])
def test_trace_format(request: pytest.FixtureRequest, name: str) -> None:
    model: Model = request.getfixturevalue(name)
    config = model.config
    for layer, block_TGK in model.trace(IDS).blocks.items():
        assert config.layer_types[layer] == "sparse"
        assert block_TGK.dtype == np.int32 and block_TGK.shape == (1500, 2, config.num_selected)
        assert block_TGK.flags.owndata
        own_T = np.arange(1500) // 128
        held = (block_TGK >= 0).sum(-1)
        np.testing.assert_array_equal(held, np.minimum(own_T + 1, config.num_selected)[:, None].repeat(2, 1))
        last = np.take_along_axis(block_TGK, held[..., None] - 1, axis=-1)[..., 0]
        np.testing.assert_array_equal(last, own_T[:, None].repeat(2, 1))
        step = np.diff(block_TGK, axis=-1)
        assert ((step > 0) | (block_TGK[..., 1:] == -1)).all()


def test_layers_with_all_blocks_are_as_if_dense(sparse: Model) -> None:
    """Up to num_selected blocks, and with as many selected as there are, the result is that of dense attention."""
    dense = Network(replace(sparse.config, layer_types=("full",) * 3))
    dense.load_state_dict(sparse.network.state_dict(), strict=False)
    wide = Network(replace(sparse.config, num_selected=64))
    wide.load_state_dict(sparse.network.state_dict())
    expected = Model(dense, sparse.tokenizer, "dense").logits(IDS)
    assert (Model(wide, sparse.tokenizer, "wide").logits(IDS) - expected).abs().max() < 1e-5
    assert (sparse.logits(IDS[:384]) - expected[:384]).abs().max() < 1e-5
    assert (sparse.logits(IDS) - expected)[600:].abs().max() > 0.1


def test_tied_head_shares_the_embedding(recorded: Model, tmp_path: Path) -> None:
    params = checkpoint.read(GOLDEN / "model", recorded.config)
    del params["head.weight"]
    checkpoint.write(tmp_path, replace(recorded.config, vision=None, tie_embeddings=True), params)
    recorded.tokenizer.save(tmp_path)
    tied = load(tmp_path)
    assert tied.config.tie_embeddings and "head.weight" not in tied.network.state_dict()
    hidden_TD = recorded.network.hidden(Batch.whole([torch.tensor(IDS[:60])]))
    assert (tied.logits(IDS[:60]) - hidden_TD @ params["embed.weight"].T).abs().max() < 1e-4
    made = list(tied.generate(IDS[:60], max_new_tokens=2))
    assert made[1] == int(tied.logits(IDS[:60] + made[:1])[-1].argmax())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([1, 320], "token id 320 is outside the vocabulary of 320"),
        ([-1], "token id -1 is outside the vocabulary of 320"),
        ([1] * 101, "101 tokens exceed the model's limit of 100"),
    ],
)
def test_prompts_that_cannot_run(recorded: Model, ids: list[int], message: str) -> None:
    short = Model(Network(replace(recorded.config, max_positions=100)), recorded.tokenizer, "short")
    for call in (short.logits, short.trace, short.generate):
        with pytest.raises(PromptError) as error:
            call(ids)
        assert str(error.value).startswith(message.split(" exceed")[0])


def test_room_to_generate_counts(recorded: Model) -> None:
    short = Model(Network(replace(recorded.config, max_positions=100)), recorded.tokenizer, "short")
    assert len(list(short.generate([1] * 98, max_new_tokens=2))) == 2
    with pytest.raises(PromptError, match="98 tokens and 3 to generate exceed the model's limit of 100"):
        short.generate([1] * 98, max_new_tokens=3)
    with pytest.raises(PromptError, match="max_new_tokens must not be negative, not -1"):
        short.generate([1], max_new_tokens=-1)
    with pytest.raises(PromptError, match="101 tokens exceed"):
        short.session(101)


def test_media_must_fit_the_prompt_and_the_model(recorded: Model) -> None:
    picture = Media.of("image", np.zeros((4, 1176), np.uint8), [(1, 2, 2)], (28, 28))
    assert recorded.config.image_id is not None
    ids = [5, recorded.config.image_id, 6]
    assert recorded.logits(ids, [picture]).shape == (3, recorded.config.vocab_size)
    for run in (recorded.logits, recorded.trace, recorded.generate):
        with pytest.raises(PromptError, match="the prompt has 1 media placeholders, the media need 2"):
            run(ids, media=[picture, picture])  # type: ignore[operator]
    blind = Model(recorded.network, recorded.tokenizer, "blind")
    blind.config = replace(recorded.config, vision=None)
    with pytest.raises(PromptError, match="reads text only: it has no vision tower"):
        blind.logits(ids, [picture])


def test_pictures_read_in_chunks_are_those_read_at_once(recorded: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 1176), np.uint8)
    picture = Media.of("image", pixels, [(1, 20, 20)], (280, 280))
    assert recorded.config.image_id is not None
    ids = [5, 6, *[recorded.config.image_id] * 100, 7, 8]
    images = recorded.see(ids, [picture])
    whole = recorded.session(200).read(ids, images=images)
    torch.testing.assert_close(recorded.session(200).read(ids, chunk=30, images=images), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(recorded.logits(ids, [picture])[-1], whole, atol=1e-4, rtol=0)
    assert (recorded.logits(ids)[-1] - whole).abs().max() > 0.01


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of a checkpoint: one line, exit code 2."""
    assert cli.main(["agree", str(GOLDEN / "golden"), "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {key: value for key, value in changes.items() if key in values["text_config"]}
    values |= {key: value for key, value in changes.items() if key not in values["text_config"]}
    (folder / "config.json").write_text(json.dumps(values))


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a folder or one of: m3-tiny" in refusal(tmp_path / "nowhere", capsys)


def test_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json at" in refusal(tmp_path, capsys)


def test_foreign_architecture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "model_type 'llama' is not a MiniMax-M3" in refusal(folder, capsys)


def test_impossible_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, num_attention_heads=7)
    assert "num_heads 7 is not a multiple of num_kv_heads 2" in refusal(folder, capsys)


def test_truncated_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    assert "model.safetensors is torn or not a safetensors file" in refusal(folder, capsys)


def test_wrong_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"] = torch.zeros(320, 64)
    save_file(tensors, folder / "model.safetensors")
    assert "language_model.lm_head.weight has shape [320, 64] instead of [320, 128]" in refusal(folder, capsys)


def test_no_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json in" in refusal(folder, capsys)


def test_tokenizer_of_a_larger_vocabulary(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 500, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="the tokenizer has 501 ids, the model only 320"):
        load(folder)


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:x", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device must be 'cpu', 'cuda' or 'cuda:N', not '{name}'"):
        load(GOLDEN / "model", device=name)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="there is no device 'cuda:2': PyTorch sees 2 CUDA GPUs"):
        load(GOLDEN / "model", device="cuda:2")


MEMORY = """
import resource, sys, torch
from dataclasses import replace
from pathlib import Path
from openm3.config import ModelConfig
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.tokens.media import Media
config = replace(
    ModelConfig.from_file(Path(sys.argv[1])), hidden_size=16, num_heads=4, head_dim=8, rotary_dim=4, index_dim=8,
    layer_types=("full", "sparse"), mlp_types=("dense", "moe"), dense_size=8, expert_size=8, shared_size=8,
)
torch.manual_seed(0)
network = Network(config).requires_grad_(False)
network.hidden(Batch.whole([torch.randint(320, (300,))]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
network.hidden(Batch.whole([torch.randint(320, (12_000,))]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_not_quadratic() -> None:
    """Scores of 4 heads over 12,000 tokens would take 2.3 GB, a mask of them 144 MB."""
    command = [sys.executable, "-c", MEMORY, str(GOLDEN / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 120e6


def test_config_is_the_networks(recorded: Model) -> None:
    assert recorded.config is recorded.network.config
    assert recorded.config == ModelConfig.from_file(GOLDEN / "model")
