"""The options of ``cas serve``."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Literal

from cas.errors import ConfigError
from cas.option_values import memory
from cas.options import Flag

_AT_LEAST_1 = ("retrieve_k", "max_new_tokens", "max_tokens", "max_cartridges", "batch", "queue")


@dataclass(frozen=True)
class ServeConfig:
    """Answer questions over HTTP, as OpenAI's API does."""

    store: str | None = None
    """The store; default $CAS_STORE, else the newest under runs/."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Clients must send this key. Better in $CAS_API_KEY: other users of this machine see what stands in a command."""
    no_api_key: Flag = False
    """Listen on any address without a key: whoever reaches it reads what the documents say."""
    retrieve_k: int = 4
    """Cartridges to retrieve where a request does not say."""
    max_cartridges: int = 32
    """Most cartridges that a request may load."""
    max_new_tokens: int = 128
    """Longest answer where a request does not say."""
    max_tokens: int = 1024
    """Longest answer that a request may ask for."""
    max_body: str = "256KiB"
    """Largest request."""
    batch: int = 32
    """Requests that decode together."""
    queue: int = 128
    """Requests that wait; more are refused (429)."""
    timeout: float = 120.0
    """Seconds until a request is given up (503), and that a stop waits for those that decode."""
    cartridge_cache: str = "1GiB"
    """Memory for the cartridges used last; those of running requests come on top."""
    model: str | None = None
    """Where the store's model is now, if it has moved: a folder, a .gguf file or a Hub name."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model; default the recorded one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type of the model; float16 on GPUs only."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence embedder; the one the index was made with."""

    def __post_init__(self) -> None:
        """Raises: ConfigError that names the option."""
        for field in fields(self):
            flag, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            if field.name in _AT_LEAST_1 and value < 1:
                raise ConfigError(f"{flag} {value}: at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: from 0 to 65535")
        if not 0 < self.timeout < 1e9:
            raise ConfigError(f"--timeout {self.timeout}: more than 0")
        if self.retrieve_k > self.max_cartridges:
            raise ConfigError(f"--retrieve-k {self.retrieve_k}: more than --max-cartridges {self.max_cartridges}")
        if self.max_new_tokens > self.max_tokens:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: more than --max-tokens {self.max_tokens}")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("--api-key: it is empty")
        if self.no_api_key and self.key is not None:
            raise ConfigError("--no-api-key, but there is a key; drop one of the two (--api-key, $CAS_API_KEY)")
        _ = self.cache_bytes, self.body_bytes

    @property
    def key(self) -> str | None:
        """The key that clients must send, if any."""
        return self.api_key or os.environ.get("CAS_API_KEY", "").strip() or None

    @property
    def cache_bytes(self) -> int:
        """Of --cartridge-cache."""
        return memory(self.cartridge_cache, "--cartridge-cache")

    @property
    def body_bytes(self) -> int:
        """Of --max-body."""
        return memory(self.max_body, "--max-body")
