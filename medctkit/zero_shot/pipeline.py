"""`transformers.pipeline("ct-zero-shot", model=folder)(scan)`; importing `medctkit.zero_shot` registers it."""

from typing import Any

import torch
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts


class CTZeroShotPipeline(Pipeline):
    """A scan, as `CTImageProcessor` takes it, to its findings with their scores, the highest first.

    For `prompts` see `ZeroShotClassifier`, for the other arguments `transformers.Pipeline`.

    Raises:
        ValueError: a processor that makes other volumes than the model wants; see also `ZeroShotClassifier`.
    """

    processor: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, *args: Any, prompts: Prompts = "paper", **kwargs: Any):
        super().__init__(*args, **kwargs)
        made, wanted = self.processor.image_processor.preprocess_config, self.model.preprocess_config
        if made != wanted:
            raise ValueError(f"the processor makes {made}, the model wants {wanted}; give the model's own processor")
        self.classifier = ZeroShotClassifier(self.model, self.processor.tokenizer, prompts)

    def _sanitize_parameters(self, **unknown: Any) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"ct-zero-shot does not know {', '.join(unknown)}; `prompts` is given when it is made")
        return {}, {}, {}

    def preprocess(self, input_: Any, **_: Any) -> Any:
        """Model input `pixel_values` (1, 1, d, h, w) of one scan, the `input_`."""
        return dict(self.processor(images=input_))

    def _forward(self, input_tensors: Any, **_: Any) -> Any:
        return {"scores": torch.from_numpy(self.classifier.scores(input_tensors["pixel_values"]))}

    def postprocess(self, model_outputs: Any, **_: Any) -> list[dict[str, Any]]:
        """Label and score of each finding from the `model_outputs`, `scores` (1, 18)."""
        rows = zip(self.classifier.findings, model_outputs["scores"][0].tolist(), strict=True)
        return sorted(({"label": name, "score": score} for name, score in rows), key=lambda row: -row["score"])


PIPELINE_REGISTRY.register_pipeline("ct-zero-shot", CTZeroShotPipeline, pt_model=AutoModel)
