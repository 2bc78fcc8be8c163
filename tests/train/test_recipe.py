"""The recipes that the command knows: consistent with themselves and with the tokenizer."""

import pytest

from openm3.config import BLOCK
from openm3.tokens.tokenizer import Tokenizer
from openm3.train.recipe import RECIPES, tiny_model


def test_tiny_model_knows_the_tokenizers_controls(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer.vocab_size)
    assert (model.bos_id, model.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_tiny_model_is_sparse_and_routed_throughout() -> None:
    model = tiny_model(4096, num_layers=3)
    assert (model.layer_types, model.mlp_types) == (("sparse",) * 3, ("moe",) * 3)
    assert model.index_dim == model.head_dim


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_consistent(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.vocab_size == recipe.model.vocab_size
    assert recipe.steps == sum(stage.steps for stage in recipe.stages) > recipe.warmup_steps
    assert len({stage.name for stage in recipe.stages}) == len(recipe.stages)
    for stage in recipe.stages:
        assert stage.mixture.tokens % stage.mixture.length == 0
        assert stage.mixture.max_position <= recipe.model.max_positions
        # Longer sequences attend to what is selected, so the index loss must look there too.
        assert stage.selected or stage.mixture.length <= recipe.model.num_selected * BLOCK
