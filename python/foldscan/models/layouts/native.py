"""Our own format."""

from __future__ import annotations

from typing import Any

from foldscan.models.config import MODEL_TYPE, HybridConfig
from foldscan.models.layouts.base import Plain, Source


class Native(Plain):
    """Our own: every model, every field."""

    model_type = MODEL_TYPE

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        return HybridConfig.from_dict({k: v for k, v in values.items() if k != "architectures"}, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        return {"architectures": ["HybridLM"], **config.to_dict()}

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        return [Source((name,))]
