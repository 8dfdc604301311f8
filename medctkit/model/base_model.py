"""A base model with what belongs to it: the mini model that the kit ships, or the released CT-CLIP."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medctkit.model.ct_clip import CTCLIPModel
from medctkit.scans.preprocessing import PreprocessConfig

FOLDER = Path(str(files("medctkit") / "assets" / "mini"))


@dataclass(frozen=True)
class BaseModel:
    """A CT-CLIP with what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: of its text encoder.
        preprocess_config: spacing (mm) and shape of its input.
    """

    model: CTCLIPModel
    tokenizer: Any
    preprocess_config: PreprocessConfig


def load_mini_base(folder: str | Path = FOLDER) -> BaseModel:
    """Load the mini base model, fresh each time: a small CT-CLIP that knows phantoms, and nothing else.

    It was pretrained on phantoms of the source hospital (`medctkit pretrain`; see the model card beside the
    weights). What it says about a real CT means nothing.

    Args:
        folder: where `medctkit pretrain` wrote; the model in the package by default.

    Raises:
        FileNotFoundError: no model in `folder`.
    """
    from transformers.utils import logging

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors; `medctkit pretrain` makes the mini base model")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # 6 MB need none
    model = CTCLIPModel.from_pretrained(folder).eval()
    if shown:
        logging.enable_progress_bar()
    return BaseModel(model, _tokenizer(folder), PreprocessConfig.for_model(model.config))


def load_base(model: str | Path = "mini", tokenizer: str | Path | None = None) -> BaseModel:
    """Load a base model by name or place.

    Args:
        model: "mini"; a folder in Hugging Face's layout; or a file in the layout of the released CT-CLIP_v2.pt (.pt or
            .safetensors).
        tokenizer: folder with the files of the text encoder's tokenizer (`medctkit download --tokenizer` fetches the
            released one); by default the model's own folder.

    Raises:
        FileNotFoundError: no such model, or no tokenizer.
        ValueError: see `CTCLIPModel.from_released_checkpoint`; a tokenizer with more words than the model.
    """
    if str(model) == "mini":
        if tokenizer is not None:
            raise ValueError(f"the mini model has a tokenizer of its own; leave {tokenizer} out")
        return load_mini_base()
    path = Path(model)
    if (path / "config.json").is_file():
        loaded, folder = CTCLIPModel.from_pretrained(path).eval(), Path(tokenizer or path)
    elif path.is_file():
        if tokenizer is None:
            raise FileNotFoundError(
                f"{path} holds weights only; give the folder of its tokenizer too. `medctkit download DIR --tokenizer` "
                "fetches the released one"
            )
        loaded, folder = CTCLIPModel.from_released_checkpoint(path), Path(tokenizer)
    else:
        raise FileNotFoundError(f"{path}: expected mini, a model's folder with a config.json, or a checkpoint file")
    words = _tokenizer(folder)
    if len(words) > loaded.config.text_config["vocab_size"]:
        raise ValueError(
            f"the tokenizer in {folder} has {len(words):,} words, the model knows "
            f"{loaded.config.text_config['vocab_size']:,}; it is the tokenizer of another model"
        )
    return BaseModel(loaded, words, PreprocessConfig.for_model(loaded.config))


def _tokenizer(folder: Path) -> Any:
    """The WordPiece tokenizer in a folder."""
    from transformers import BertTokenizerFast

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected a tokenizer.json or vocab.txt there")
    return BertTokenizerFast.from_pretrained(folder)
