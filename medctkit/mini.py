"""The mini base model that the kit ships: a small CT-CLIP that knows phantoms, and nothing else."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medctkit.ctclip import CTCLIPModel
from medctkit.preprocessing import PreprocessConfig

FOLDER = Path(str(files("medctkit") / "assets" / "mini"))


@dataclass(frozen=True)
class MiniBase:
    """The mini model with what belongs to it.

    Attributes:
        model: CT-CLIP at a small size, in evaluation mode.
        tokenizer: WordPiece tokenizer of its text encoder.
        preprocess_config: spacing (mm) and shape of its input.
    """

    model: CTCLIPModel
    tokenizer: Any
    preprocess_config: PreprocessConfig


def load_mini_base(folder: str | Path = FOLDER) -> MiniBase:
    """Load the mini base model, fresh each time.

    It was pretrained on phantoms of the source hospital (`medctkit pretrain`; see the model card beside the
    weights). What it says about a real CT means nothing.

    Args:
        folder: where `medctkit pretrain` wrote; the model in the package by default.

    Raises:
        FileNotFoundError: no model in `folder`.
    """
    from transformers import BertTokenizerFast
    from transformers.utils import logging

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors; `medctkit pretrain` makes the mini base model")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # 6 MB need none
    model = CTCLIPModel.from_pretrained(folder).eval()
    if shown:
        logging.enable_progress_bar()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    return MiniBase(model, tokenizer, PreprocessConfig.for_model(model.config))
