"""MedCT-VLM, taught and reproduced: CT-CLIP adapted with LoRA in both encoders.

Names load on first use, so that `import medctkit` takes milliseconds although torch and transformers
take seconds.
"""

from importlib import import_module

_HOME = {
    "FINDINGS": "findings",
    "PREVALENCE": "findings",
    "CTVolume": "volumes",
    "read_volume": "volumes",
    "PreprocessConfig": "preprocessing",
    "preprocess": "preprocessing",
    "CTReportDataset": "dataset",
    "CTCLIPConfig": "ctclip",
    "CTCLIPModel": "ctclip",
    "load_mini_base": "mini",
    "ZeroShotClassifier": "zero_shot",
    "classify": "quickstart",
}
_MODULES = (
    "findings",
    "hounsfield",
    "volumes",
    "heat_maps",
    "rendering",
    "reports",
    "phantom",
    "preprocessing",
    "transforms",
    "manifest",
    "ctrate",
    "hub",
    "cache",
    "prepare",
    "dataset",
    "ctclip",
    "mini",
    "lora",
    "memory",
    "methods",
    "objectives",
    "gradients",
    "training",
    "zero_shot",
    "quickstart",
    "embeddings",
    "retrieval",
    "attention",
    "localisation",
    "metrics",
    "audit",
    "experiment",
    "comparison",
    "comparison_results",
    "measurement",
    "localisation_measurement",
    "report",
    "viewers",
    "exercises",
    "worlds",
)

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("medctkit")
    if name in _HOME:
        value = getattr(import_module(f"medctkit.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"medctkit.{name}")
    else:
        raise AttributeError(f"module 'medctkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
