"""The adapter that comes with the package is of the mini model that does."""

import json
from importlib.resources import files

import torch

from medctkit import load_mini_base, lora

FOLDER = files("medctkit") / "assets" / "adapter"


def test_the_shipped_adapter_is_of_the_shipped_model_and_its_scores_of_its_ranks():
    mini = load_mini_base()
    volumes = torch.rand(2, 1, *mini.preprocess_config.shape) * 2 - 1
    with torch.no_grad():
        before = mini.model.eval().encode_image(volumes)
        adapted = lora.load_adapter(mini.model, str(FOLDER)).eval()  # refuses any other base model
        after = adapted.encode_image(volumes)
        with lora.at_rank(adapted, 0):
            assert torch.equal(adapted.encode_image(volumes), before)
    assert not torch.allclose(before, after, atol=1e-3)
    said = json.loads((FOLDER / "by_rank.json").read_text())
    scores = [said["validation_auroc"][rank] for rank in sorted(said["validation_auroc"], key=int)]
    assert list(map(int, said["validation_auroc"])) == [0, 1, 2, 3, 4, 6, 8, 12, adapted.peft_config["default"].r]
    assert all(0.5 < score < 1 for score in scores) and scores[0] < min(scores[1:])
    assert said["studies"] == 222 and said["made_with"]["data"] == "phantom"
