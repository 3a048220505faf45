"""Mixtures whose transformers file is first imported inside `zero.Init`, as in a fresh process."""

from __future__ import annotations

import pytest

from tests.sharding.processes import run_on_ranks


def built_first_inside_zero_init(family: str) -> list[tuple[int, ...]]:
    import sys

    import deepspeed

    from lit_symopt import models
    from lit_symopt.blocks import shape_of
    from tests.models.tiny import MIXTURE, SHARED, tokens

    folder = {"OLMoE": "olmoe", "GptOss": "gpt_oss"}[family]
    assert f"transformers.models.{folder}.modeling_{folder}" not in sys.modules
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = getattr(models, family)(**{**SHARED, **MIXTURE})
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        module.loss(tokens(2, 6)).backward()
    return [shape_of(parameter) for parameter in module.parameters()]


@pytest.mark.deepspeed
@pytest.mark.parametrize("family", ["OLMoE", "GptOss"])
def test_a_mixture_can_be_the_first_thing_that_a_process_builds(family: str) -> None:
    from lit_symopt import models
    from tests.models.tiny import MIXTURE, SHARED

    whole = [tuple(parameter.shape) for parameter in getattr(models, family)(**{**SHARED, **MIXTURE}).parameters()]
    for shapes in run_on_ranks(built_first_inside_zero_init, 2, family):
        assert shapes == whole
