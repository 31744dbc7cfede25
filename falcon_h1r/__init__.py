"""Falcon-H1 and Falcon-H1R in PyTorch: a reference to study, test against and measure with.

A name is imported when it is first used, so that the command line answers `--help` and typing
errors without the seconds that importing torch takes.
"""

TYPE_CHECKING = False  # as in typing, which takes as long to import as all that stands here
if TYPE_CHECKING:  # for editors
    from .cache import Cache as Cache
    from .checkpoint import CheckpointError as CheckpointError
    from .config import ConfigError as ConfigError
    from .config import FalconH1Config as FalconH1Config
    from .generation import SamplingParams as SamplingParams
    from .generation import generate as generate
    from .generation import stream as stream
    from .model import FalconH1ForCausalLM as FalconH1ForCausalLM
    from .text import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_MODULES = {
    "Cache": "cache",
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "FalconH1Config": "config",
    "FalconH1ForCausalLM": "model",
    "SamplingParams": "generation",
    "generate": "generation",
    "load_tokenizer": "text",
    "stream": "generation",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    from importlib import import_module
    from importlib.util import find_spec

    if name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    # `import falcon_h1r` is enough to reach `falcon_h1r.ops`.
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
