"""MedCT-VLM, taught and reproduced: CT-CLIP adapted with LoRA in both encoders.

Names and wings load on first use, so that `import medctkit` takes milliseconds although torch and transformers
take seconds. `__init__.pyi` beside this file says the same to editors.
"""

from importlib import import_module

_HOME = {
    "FINDINGS": "findings",
    "CTVolume": "scans",
    "read_volume": "scans",
    "PreprocessConfig": "scans",
    "preprocess": "scans",
    "CTReportDataset": "cohort",
    "sample_ct": "cohort",
    "CTCLIPConfig": "model",
    "CTCLIPModel": "model",
    "load_base": "model",
    "load_mini_base": "model",
    "add_lora": "lora",
    "load_adapter": "lora",
    "FineTuneConfig": "training",
    "finetune": "training",
    "ZeroShotClassifier": "zero_shot",
    "classify": "quickstart",
}
_WINGS = (
    "findings",
    "scans",
    "metrics",
    "phantom",
    "model",
    "cohort",
    "lora",
    "training",
    "zero_shot",
    "attention",
    "deploy",
    "viewers",
    "experiments",
    "course",
)

__all__ = ["__version__", *_HOME, *_WINGS]


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("medctkit")
    if name in _HOME:
        value = getattr(import_module(f"medctkit.{_HOME[name]}"), name)
    elif name in _WINGS:
        value = import_module(f"medctkit.{name}")
    else:
        raise AttributeError(f"module 'medctkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
