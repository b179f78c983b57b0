"""Random numbers belong to a model: they do not change when another model lacks the tensor."""

from __future__ import annotations

import numpy as np

import smelt


def test_a_model_draws_the_same_without_the_others() -> None:
    rng = np.random.default_rng(0)
    base, one, two, three = ({"w": rng.standard_normal(1000, dtype=np.float32)} for _ in range(4))
    settings = {"method": "dare_linear", "base": base, "weight": [0, 0, 1], "density": 0.5, "rescale": False}
    whole = smelt.merge_state_dicts([one, two, three], **settings)["w"]
    assert 300 < np.count_nonzero(whole == base["w"]) < 700
    other = {"v": one["w"]}
    lacking = smelt.merge_state_dicts([one, other, three], allow=["missing_tensor", "extra_tensor"], **settings)["w"]
    assert whole.tobytes() == lacking.tobytes()
