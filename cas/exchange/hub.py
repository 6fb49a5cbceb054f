"""``cas push`` and ``cas pull``: stores, or single cartridges, on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cas.errors import CasError, RunError
from cas.exchange.parcel import RECORD, choose, files_of, pack, read_record, unpack
from cas.store.store import Store


def push(store: Store, name: str, ids: Sequence[str] = (), *, public: bool = False) -> str:
    """Make the repository ``name`` (``owner/name``) hold these documents of a finished store (none given: all), in one
    commit; it is made if need be, private unless ``public``. The token is huggingface_hub's own (``hf auth login``).

    Returns: its address. Raises: ConfigError, CollectionError as :func:`pack`; RunError for what the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = pack(store, ids, Path(folder), name)
        with _hub(name) as api:
            address = str(api.create_repo(name, private=not public, exist_ok=True))
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=f"Add {count} cartridges",
                delete_patterns=["cartridges/*", "texts/*"],  # what an earlier push had and this one has not
            )
    return address


def pull(name: str, target: Path, ids: Sequence[str] = (), revision: str | None = None) -> Store:
    """A new store with these documents (none given: all) of a repository, verified.

    Returns: the store, open for reading. Raises: StoreExists; CollectionError for unknown ids or broken files; RunError for
        what the Hub refuses.
    """
    Store.exists(target)  # refuses a file in its place
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.pull-") as folder:
        with _hub(name) as api:
            info = api.repo_info(name, revision=revision)
            record = api.hf_hub_download(name, RECORD, revision=info.sha, local_dir=folder)
        about = read_record(Path(record))
        wanted = [place for document in choose(about, ids) for place in files_of(document["id"])]
        with _hub(name) as api:
            patterns = wanted if ids else ["cartridges/*.safetensors", "texts/*.txt"]
            api.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=patterns)
        return unpack(Path(folder), about, ids, target)


@contextlib.contextmanager
def _hub(name: str) -> Iterator[Any]:
    """A client of the Hub (``$HF_ENDPOINT``); whatever it raises is one line."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        yield HfApi(library_name="cas-cartridges")
    except CasError:
        raise
    except Exception as error:  # the client has errors of its own, of its HTTP library and of the operating system
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunError(f"{name}: {(lines or [type(error).__name__])[0]}") from error
