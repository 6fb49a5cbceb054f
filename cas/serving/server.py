"""``cas serve``: open the store, listen, answer, stop in good order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import ConfigError, UserError
from cas.option_values import store_folder
from cas.options import parse
from cas.serving.config import ServeConfig

if TYPE_CHECKING:
    from cas.serving.engine import Engine
    from cas.store.store import Store

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra ``serve``
HEAD_SECONDS = 20.0  # for a request's head to arrive
READ_SECONDS = 30.0  # for a client to read what was sent
CONNECTIONS = 512  # more are refused at once; below the usual limit of open files


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes. Returns the exit status."""
    return console.run(lambda: serve(parse(ServeConfig, "python -m cas serve", arguments)))


def serve(config: ServeConfig) -> int:
    """Open the store and answer until SIGTERM or Ctrl-C; then what is being decoded is finished."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"cas serve needs {', '.join(missing)}: pip install 'cas-cartridges[serve]'")
    folder = store_folder(config.store)
    with bind(config) as listener:
        from cas.store.store import Store

        with Store.open(folder) as store:
            if not store.answering():
                raise UserError(f"{folder} has no cartridges yet; go on with its training")
            with console.Display("loading", passing=True):
                engine = open_engine(store, config)
            return run(engine, config, listener)


def bind(config: ServeConfig) -> socket.socket:
    """A socket on the address and port that the options name.

    Raises: ConfigError for an address that strangers can reach, without a key; UserError for one that cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {config.host}: {error.strerror}") from error
    if config.key is None and not config.no_api_key and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"--host {config.host} can be reached from elsewhere: set $CAS_API_KEY, or answer anybody (--no-api-key)"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # so that a second server on this port ends before it loads a model
    except OSError as error:
        listener.close()
        raise UserError(f"--host {config.host} --port {config.port}: {error.strerror}; choose another") from error
    return listener


def open_engine(store: Store, config: ServeConfig) -> Engine:
    """Model, retrieval index and engine, as the options say."""
    from cas.answering.answerer import Answerer
    from cas.model.frozen import FrozenModel
    from cas.serving.engine import Engine, Limits
    from cas.store.index import load_embedder

    model = FrozenModel.from_store(store, config.model, config.revision, config.dtype, config.device)
    answerer = Answerer(model, store, load_embedder(config.embedder), cache_bytes=config.cache_bytes)
    _ = answerer.index  # what is not embedded yet, such as after an interrupted training, is embedded here
    limits = Limits(config.batch, config.queue, config.timeout, config.max_cartridges, config.max_tokens)
    return Engine(answerer, limits)


def model_name(source: str) -> str:
    """What clients call the model: its name on the Hub, or the last part of its path."""
    name = source.removeprefix("package:")
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") or Path(name).exists() else name


def run(engine: Engine, config: ServeConfig, listener: socket.socket) -> int:
    """Answer on a bound socket until a signal comes. Returns the exit status."""
    from cas.serving.app import LOOPBACK_NAMES, Settings, create_app

    store, host = engine.answerer.store, listener.getsockname()[0]
    loopback = ipaddress.ip_address(host).is_loopback
    settings = Settings(
        model=model_name(engine.answerer.model.source.name),
        key=config.key,
        max_body=config.body_bytes,
        retrieve_k=config.retrieve_k,
        max_new_tokens=config.max_new_tokens,
        hosts=LOOPBACK_NAMES | {host} if loopback and config.key is None else None,
    )
    place = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    if config.no_api_key and not loopback:
        print("warning: anybody who reaches this address is answered (--no-api-key)", file=sys.stderr)
    count = len(store.answering())
    print(
        console.harmless(f"{store.folder}: {count} cartridges, {settings.model}, on {place}"),
        file=sys.stderr,
        flush=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    server = make_server(create_app(engine, settings), engine, config.timeout)
    server.run(sockets=[listener])
    if not server.force_exit:
        engine.close()
        print("stopped", file=sys.stderr)
    return 0


def make_server(app: Any, engine: Engine, timeout: float) -> Any:
    """A uvicorn server that a slow client does not hold up, and that ends in good order."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # what is asked is nobody else's business
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(timeout) + 1,
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            engine.drain()
            await super().shutdown(sockets)
            if not self.force_exit:
                self._captured_signals.clear()  # else it would end by the signal, as if it had been killed

    return Server(config)


def _protocol() -> type[asyncio.Protocol]:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        """Ends connections whose client is too slow: with a request's head, or in reading what was sent."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timers: dict[str, asyncio.TimerHandle] = {}
            transport.set_write_buffer_limits(0)  # writing pauses while anything is unread
            self._allow("head", HEAD_SECONDS)

        def handle_events(self) -> None:
            super().handle_events()
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._allow("head", HEAD_SECONDS)
            else:
                self._arrived("head")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._allow("read", READ_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._arrived("read")

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived("head")
            self._arrived("read")
            super().connection_lost(exc)

        def _allow(self, what: str, seconds: float) -> None:
            if what not in self._timers:
                self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

        def _arrived(self, what: str) -> None:
            if (timer := self._timers.pop(what, None)) is not None:
                timer.cancel()

    return Patient


if __name__ == "__main__":
    sys.exit(main())
