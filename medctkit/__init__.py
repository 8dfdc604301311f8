"""MedCT-VLM, taught and reproduced: CT-CLIP adapted with LoRA in both encoders.

Names and wings load on first use, so that `import medctkit` takes milliseconds although torch and transformers
take seconds. Which there are stands in `__init__.pyi` beside this file, where editors find it too.
"""

import re
from importlib import import_module
from pathlib import Path

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.M)}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("medctkit")
    if name not in _HOME:
        raise AttributeError(f"module 'medctkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _HOME[name]
    found = import_module(f"{home}.{name}") if home == __name__ else getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted({*globals(), *__all__})
