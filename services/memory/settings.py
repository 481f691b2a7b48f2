"""The settings of memory, read from the environment."""

from __future__ import annotations

from typing import Self

from pydantic import SecretStr, model_validator

from infra.service.settings import SecretStoreUrl, Settings, StoreUrl


class MemorySettings(Settings):
    billing_grpc: str
    milvus_url: SecretStoreUrl
    s3_endpoint: StoreUrl
    s3_access_key: str
    s3_secret_key: SecretStr

    embedding_base_url: str | None = None
    """URL of an OpenAI-shaped endpoint (ends in ``/v1``). Without it the process computes embeddings offline."""
    embedding_model: str | None = None
    embedding_api_key: SecretStr | None = None

    rerank_base_url: str | None = None
    """URL of a Cohere-shaped endpoint without its last part ``/rerank``. Without it the fused order is the answer's."""
    rerank_model: str | None = None
    rerank_api_key: SecretStr | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.embedding_base_url and not self.embedding_model:
            raise ValueError("CLAW_EMBEDDING_MODEL: must be set if CLAW_EMBEDDING_BASE_URL is set")
        if self.rerank_base_url and not self.rerank_model:
            raise ValueError("CLAW_RERANK_MODEL: must be set if CLAW_RERANK_BASE_URL is set")
        return self
