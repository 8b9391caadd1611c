import dataclasses

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mint_ray.config.loader import UserError
from mint_ray.layouts.masks import get_attn_implementation
from mint_ray.objectives.config import Orpo
from mint_ray.trainers.config import TrainerArguments, TrainResources
from tests.trainers.workers import tiny_adapter, train


@pytest.mark.parametrize("kind", ["shared_prefix", "trl"])
@pytest.mark.parametrize(
    "kernels", [{"attn_implementation": "eager"}, pytest.param({"torch_compile": True}, marks=pytest.mark.slow)]
)
def test_the_configured_kernels_run_and_train_the_same_weights(tmp_path, kind, kernels):
    objective = Orpo(nll_on="full")  # which TRL supports too
    config = TrainerArguments(kind=kind, objective=objective, train_batch_size=4, learning_rate=1e-3, logging_steps=1)
    four = TrainResources(per_device_train_batch_size=4)
    plain, expected = train(tmp_path / "plain", config, four, model=tiny_adapter(), validation=2)
    asked = dataclasses.replace(four, **kernels)
    model = tiny_adapter()
    result, weights = train(tmp_path / "asked", config, asked, model=model, validation=2)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 2
    assert get_attn_implementation(model) == "eager" or all(layer._compiled_call_impl is not None for layer in layers)
    losses = [[row["loss"] for row in said.log_history if "loss" in row] for said in (result, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_for_gpus_raises_an_error_without_a_gpu(tmp_path):
    with pytest.raises(UserError, match="attn_implementation: flex_attention trains on GPUs only"):
        train(tmp_path, TrainerArguments(), TrainResources(attn_implementation="flex_attention"))
