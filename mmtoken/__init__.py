"""Visual-token compression for Hugging Face vision-language models.

```python
import mmtoken
from mmtoken.compressors import DivPrune

model, processor = mmtoken.load("tiny-llava")
with mmtoken.compress(model, DivPrune(keep=16)) as session:
    model.generate(**inputs)
print(session.report.tokens_out)
```

Names are loaded when they are first used: importing mmtoken itself imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtoken.control.episode import Episode
    from mmtoken.control.policy import Policy
    from mmtoken.engine.inputs import compress_inputs
    from mmtoken.engine.learned import learnable
    from mmtoken.engine.report import Report
    from mmtoken.engine.session import Session, attach, attached, check, compress
    from mmtoken.errors import MMTokenError
    from mmtoken.hub import list_models, load, push, save
    from mmtoken.streaming.stream import Stream, stream
    from mmtoken.tokens import VisualTokens

__version__ = "0.1.0"

_HOMES = {
    "Episode": "mmtoken.control.episode",
    "MMTokenError": "mmtoken.errors",
    "Policy": "mmtoken.control.policy",
    "Report": "mmtoken.engine.report",
    "Session": "mmtoken.engine.session",
    "Stream": "mmtoken.streaming.stream",
    "VisualTokens": "mmtoken.tokens",
    "attach": "mmtoken.engine.session",
    "attached": "mmtoken.engine.session",
    "check": "mmtoken.engine.session",
    "compress": "mmtoken.engine.session",
    "compress_inputs": "mmtoken.engine.inputs",
    "learnable": "mmtoken.engine.learned",
    "list_models": "mmtoken.hub",
    "load": "mmtoken.hub",
    "push": "mmtoken.hub",
    "save": "mmtoken.hub",
    "stream": "mmtoken.streaming.stream",
}

__all__ = [
    "Episode",
    "MMTokenError",
    "Policy",
    "Report",
    "Session",
    "Stream",
    "VisualTokens",
    "attach",
    "attached",
    "check",
    "compress",
    "compress_inputs",
    "learnable",
    "list_models",
    "load",
    "push",
    "save",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmtoken' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
