"""A base model with what belongs to it: the mini model that the kit ships, the released CT-CLIP, or one of your own."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from medctkit.model.colipri import INPUT, load_colipri
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.fingerprint import vocabulary_of
from medctkit.model.processing import CTCLIPProcessor, CTImageProcessor
from medctkit.model.protocol import VisionLanguageModel
from medctkit.scans.preprocessing import PreprocessConfig

FOLDER = Path(str(files("medctkit") / "assets" / "mini"))
_PADDING = 128  # an embedding may be filled up to a multiple of it


@dataclass(frozen=True)
class BaseModel:
    """A model in evaluation mode that keeps `VisionLanguageModel`, and the tokenizer of its text encoder."""

    model: Any
    tokenizer: Any

    @property
    def preprocess_config(self) -> PreprocessConfig:
        """The volumes that the model wants."""
        return self.model.preprocess_config

    @property
    def processor(self) -> CTCLIPProcessor:
        """Scans and texts to model input, for `transformers.pipeline` and `processor.save_pretrained`."""
        return CTCLIPProcessor(CTImageProcessor.of(self.preprocess_config), self.tokenizer)


def load_mini_base(folder: str | Path = FOLDER) -> BaseModel:
    """Load the mini base model, fresh each time: a small CT-CLIP that knows phantoms, and nothing else.

    It was pretrained on phantoms of the source hospital (by `medctkit pretrain`, whose `folder` may be another than the
    package's; see the model card there). What it says about a real CT means nothing. Raises what `load_base` raises.
    """
    folder = Path(folder).expanduser()
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors; `medctkit pretrain` makes the mini base model")
    return _with_tokenizer(CTCLIPModel.from_pretrained(folder), folder)


def _load_colipri() -> BaseModel:
    model, folder = load_colipri()
    return BaseModel(model, _tokenizer_in(folder))


# What `load_base` knows by name; add your own
BASES: dict[str, Callable[[], BaseModel]] = {"mini": load_mini_base, "colipri": _load_colipri}


def load_base(model: str | Path = "mini", tokenizer: str | Path | None = None) -> BaseModel:
    """Load a base model by name or place.

    Args:
        model: a name out of `BASES`, "mini" or "colipri" (1 GB, downloaded once; see `load_colipri`); a CT-CLIP's
            folder in Hugging Face's layout; or a file in the layout of the released CT-CLIP_v2.pt (.pt or
            .safetensors).
        tokenizer: folder with the files of the text encoder's tokenizer (`medctkit download --tokenizer` fetches the
            released one); by default the model's own folder.

    Raises:
        FileNotFoundError: no such model, or no tokenizer.
        ValueError: see `CTCLIPConfig.from_pretrained` and `CTCLIPModel.from_released_checkpoint`; a tokenizer that
            cannot be read, or of another model.
        TypeError: a model of `BASES` that does not keep the protocol.
    """
    if str(model) in BASES:
        if tokenizer is not None:
            raise ValueError(f"the {model} model has a tokenizer of its own; leave {tokenizer} out")
        base = BASES[str(model)]()
        members = sorted([*VisionLanguageModel.__annotations__, "encode_image", "encode_text"])
        if lacking := [name for name in members if not hasattr(base.model, name)]:
            raise TypeError(f"{type(base.model).__name__} lacks {', '.join(lacking)}; see VisionLanguageModel")
        return base
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return _with_tokenizer(CTCLIPModel.from_pretrained(path), Path(tokenizer or path))
    if not path.is_file():
        names = ", ".join(BASES)
        raise FileNotFoundError(f"{path}: expected {names}, a model's folder with a config.json, or a checkpoint file")
    if tokenizer is None:
        raise FileNotFoundError(
            f"{path} holds weights only; give the folder of its tokenizer too. `medctkit download DIR --tokenizer` "
            "fetches the released one"
        )
    return _with_tokenizer(CTCLIPModel.from_released_checkpoint(path), Path(tokenizer))


def preprocess_config_of(model: str | Path) -> PreprocessConfig:
    """The volumes that a base model wants, of a name or folder as `load_base` takes it, or "released"; no weights read.

    Raises:
        FileNotFoundError: no such model.
        ValueError: see `CTCLIPConfig.from_pretrained`.
    """
    if str(model) in ("released", "colipri"):
        return PreprocessConfig() if str(model) == "released" else INPUT
    folder = FOLDER if str(model) == "mini" else Path(model).expanduser()
    if (folder / "config.json").is_file():
        return CTCLIPConfig.from_pretrained(folder).preprocess_config
    if str(model) in BASES:
        return BASES[str(model)]().preprocess_config
    raise FileNotFoundError(f"{model}: expected {', '.join(BASES)}, released, or a folder with a config.json")


def _with_tokenizer(model: CTCLIPModel, folder: Path) -> BaseModel:
    """A CT-CLIP, in float32, and the tokenizer in a folder, whose digest it keeps, and knows when it is saved."""
    tokenizer = _tokenizer_in(folder)
    found = vocabulary_of(tokenizer)
    words, known = model.config.text_config["vocab_size"], model.config.vocabulary
    if not words - _PADDING < len(tokenizer) <= words or known not in (None, found):
        has = f"has {len(tokenizer):,} words, the model knows {words:,}" + (
            "" if known is None else f"; their digest is {found}, of the model's own it is {known}"
        )
        raise ValueError(f"the tokenizer in {folder} {has}; it is the tokenizer of another model")
    model.config.vocabulary = found
    return BaseModel(model.float().eval(), tokenizer)


def _tokenizer_in(folder: Path) -> Any:
    """The WordPiece tokenizer whose files lie in a folder."""
    folder = folder.expanduser()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected a tokenizer.json or vocab.txt there")
    try:
        # on the left, whatever its files say, stands the token that a sentence is read from
        tokenizer = BertTokenizerFast.from_pretrained(folder, padding_side="right")
        tokenizer(["word", "one word more"], padding=True)["attention_mask"]
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}. Download it again") from error
    return tokenizer
