"""What the command lines accept: frozen dataclasses, filled by a YAML file under the flags."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from cas.errors import ConfigError

_C = TypeVar("_C")
Initialization = Literal["first", "sampled", "random", "matched"]
KINDS = ("question", "structuring", "summarisation", "use case", "creative")  # 2506.06266, section 4.1
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FICTIONAL = ("million_tokens",)  # collections that the reader in this package is for
READER = "reader"  # the small model in this package; it reads the fictional worlds of cas.data.worlds and nothing else
DEFAULT_SYSTEM = "Answer the question from the documents below. Keep the answer short."


@dataclass(frozen=True)
class Inputs:
    """What is trained on, over which model, and what a cartridge is."""

    collection: str | None = None
    """A folder of .txt/.md files, a .jsonl[.gz] file of {id, title, text}, or a named collection, such as million_tokens."""
    collection_seed: int = 0
    """Seed of a generated collection (million_tokens, niah)."""
    store: str | None = None
    """Where the cartridges live; default $CAS_STORE, else runs/<collection>."""
    config: str | None = None
    """A YAML file with any of these options; flags win over it."""
    model: str | None = None
    """Hub name, local folder or .gguf file of a decoder-only RoPE model, or `reader`, the small one in this package. Default
    reader for million_tokens, which is all it can read, else SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the frozen model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    system: str = DEFAULT_SYSTEM
    """Instruction in front of the documents; part of the shared header."""
    documents: int | None = None
    """Use only the first so many documents (by id)."""
    merge: bool = False
    """Merge the collection into one document: a monolithic cartridge."""

    tokens: int | None = None
    """Positions of every cartridge (a multiple of 4); instead of --ratio."""
    ratio: float | None = None
    """Document tokens per position; 16 if neither this nor --tokens is given."""
    span: int | None = None
    """Largest cartridge; with --ratio, longer documents are split. Default: what the longest document needs."""
    positions: Literal["fixed", "offset", "sequential"] = "fixed"
    """Where keys and tokens stand when several cartridges are loaded."""
    initialisation: Literal["first", "sampled", "random", "matched"] = "matched"
    """Keys picked from the document with values fitted to self-study (documents that are too long for one pass start as
    first), KV of the first tokens, of sampled chunks (SCI), or noise."""


@dataclass(frozen=True)
class SelfStudy:
    """Settings of the synthesis."""

    conversations: int | None = None
    """Self-study conversations to keep, at least; default a quarter of the tokens, at least 64 a document; for
    the embedded reader --wordings of every kind about every sentence, as far as they differ."""
    wordings: int = 4
    """Questions of a kind that the embedded reader writes about a sentence; those after the first are sampled."""
    chunk_tokens: int = 512
    """Tokens of text, in whole sentences, that the teacher sees at a time."""
    questions_per_call: int = 32
    """Questions asked for in one call; they share its chunk and seed prompt."""
    calls_per_unit: int = 2
    """Calls in one file of conversations; what an interruption may lose."""
    question_tokens: int = 40
    """Longer questions are dropped and counted."""
    answer_tokens: int = 48
    """Longer answers are dropped and counted, never cut."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of seed prompt."""
    top_k: int = 20
    """Most likely tokens whose probabilities are kept of the teacher."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ConfigError(
                f"unknown kinds of seed prompt: {', '.join(unknown) or 'none given'}; choose from {', '.join(KINDS)}"
            )
        for field in fields(SelfStudy):
            value = getattr(self, field.name)
            if field.name not in ("kinds", "seed") and value is not None and value < 1:
                raise ConfigError(f"--{field.name.replace('_', '-')} {value}: at least 1")


@dataclass(frozen=True)
class Training:
    """Settings of a run; those of the schedule are explained in :class:`cas.training.schedule.Schedule`."""

    epochs: float = 8.0
    """Passes over all conversations."""
    steps: int | None = None
    """Training steps; overrides --epochs."""
    lr: float = 2e-2
    """Peak learning rate of Adam."""
    warmup: int = 20
    """Steps of a cartridge's own until its learning rate peaks."""
    final_lr: float = 0.02
    """Where the linear decay of the learning rate ends, as a share of its peak."""
    pool: int | None = None
    """Cartridges in training at a time; default the most that --budget holds, at most 20."""
    targets: int = 4
    """Cartridges that one step trains."""
    per_target: int = 8
    """Conversations of each target in a step."""
    isolation: float = 0.75
    """Probability that a conversation sees its own cartridge alone; 1 is isolated training."""
    max_distractors: int = 10
    """Else it sees 1 to so many others as well."""
    guests: int = 0
    """Read-only cartridges from outside the pool among the distractors."""
    rotate_every: int = 10
    """Steps between rotations of the pool."""
    rotate_fraction: float = 0.5
    """Share of the pool that a rotation exchanges, most trained out, least trained in."""
    distractor_gradients: bool = False
    """Distractors in the pool learn as well, at their next turn as target."""
    objective: Literal["distillation", "next-token"] = "distillation"
    """What the loss compares with: the teacher's probabilities, or its words."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for field in fields(Training):
            name, value = field.name, getattr(self, field.name)
            flag = f"--{name.replace('_', '-')} {value}"
            if value is None:
                continue
            if name in ("pool", "targets", "per_target", "rotate_every", "checkpoint_every") and value < 1:
                raise ConfigError(f"{flag}: at least 1")
            if name in ("guests", "max_distractors", "warmup", "steps") and value < 0:
                raise ConfigError(f"{flag}: at least 0")
            if name in ("isolation", "rotate_fraction", "final_lr") and not 0 <= value <= 1:
                raise ConfigError(f"{flag}: from 0 to 1")
            if name in ("lr", "epochs") and not 0 < value < math.inf:
                raise ConfigError(f"{flag}: more than 0")
            if name == "objective" and value not in ("distillation", "next-token"):
                raise ConfigError(f"{flag}: choose distillation or next-token")


@dataclass(frozen=True)
class TrainConfig(Training, SelfStudy, Inputs):
    """Train a collection of cartridges: self-study, joint training, retrieval index. Resumes by itself."""

    budget: str | None = None
    """All device memory that training may take, e.g. 6GiB; default no limit but the machine's."""
    host_memory: str = "0"
    """Memory for cartridges outside the pool, e.g. 2GiB; never changes a result."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence embedder of the retrieval index."""
    dry_run: bool = False
    """Print the plan and stop; writes nothing (but a GGUF model is unpacked, once)."""

    def __post_init__(self) -> None:
        """Nothing is checked while flags are parsed, whose errors look otherwise; see :meth:`part`."""

    def part(self, kind: type[_C]) -> _C:
        """The settings of one kind, :class:`SelfStudy` or :class:`Training`, by themselves. Raises: ConfigError."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class QueryConfig:
    """Answer questions from a trained collection. Without a question, a prompt that keeps the model loaded."""

    question: str | None = None
    """The question; may also stand bare, in quotes."""
    store: str | None = None
    """The store; default $CAS_STORE, else the newest under runs/."""
    retrieve_k: int = 4
    """Cartridges to retrieve and load."""
    documents: str | None = None
    """Load these documents' cartridges (ids, comma-separated) instead of retrieving."""
    max_new_tokens: int = 128
    """Longest answer."""
    json: bool = False
    """Print one JSON object instead of text."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence embedder; the one the index was made with."""


def parse(kind: type[_C], program: str, arguments: Sequence[str]) -> _C:
    """Flags over a YAML file over defaults. Exits with status 2 for unknown or malformed flags, as argparse does.

    Raises: ConfigError for a bad YAML file.
    """
    import tyro

    if "question" in {f.name for f in fields(kind)}:  # type: ignore[arg-type]
        arguments = _positional(arguments)
    file = _value_of(arguments, "--config")
    default = kind(**_from_yaml(kind, file)) if file else kind()
    return tyro.cli(kind, prog=program, args=list(arguments), default=default, config=(tyro.conf.FlagCreatePairsOff,))


def memory(text: str, option: str) -> int:
    """Bytes of "6GiB", "500MB", "2G" (1024 based for GiB, MiB and bare G, M; 1000 based for GB, MB) or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match:
        raise ConfigError(f"{option} {text}: give bytes as 6GiB, 500MB or a number")
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    return int(float(number) * base ** (" kmgt".index(unit) if unit else 0))


def store_folder(given: str | None, collection: str | None = None) -> Path:
    """The store that a command means: its option, else $CAS_STORE, else runs/<collection>; to query, the newest of runs/.

    Raises: ConfigError when there is none.
    """
    if given or os.environ.get("CAS_STORE"):
        return Path(given or os.environ["CAS_STORE"])
    if collection is not None:
        return Path("runs") / (
            Path(collection).absolute().resolve().name.removesuffix(".gz").removesuffix(".jsonl") or "collection"
        )
    stores = sorted(Path("runs").glob("*/cartridges.lmdb"), key=lambda p: p.stat().st_mtime)
    if not stores:
        raise ConfigError(
            "there is no store under runs/; give --store, or train one: python -m cas.train --collection FOLDER"
        )
    print(f"store: {stores[-1].parent} (the newest under runs/; --store chooses another)", file=sys.stderr)
    return stores[-1].parent


def _positional(arguments: Sequence[str]) -> list[str]:
    """``query "Which valve?"`` as ``query --question "Which valve?"``: the one bare word is the question; behind ``--`` it
    may begin with a dash."""
    flags = {"--json", "--help", "-h"}
    out, expects, bare = [], False, list[str]()
    for at, argument in enumerate(arguments):
        if argument == "--":
            bare += arguments[at + 1 :]
            break
        if not expects and not argument.startswith("-"):
            bare.append(argument)
            continue
        expects = not expects and argument.startswith("--") and "=" not in argument and argument not in flags
        out.append(argument)
    if len(bare) > 1:
        raise ConfigError(f'put the question into quotes: "{" ".join(bare)}"')
    return out + [f"--question={word}" for word in bare]


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def _from_yaml(kind: type, file: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config {file}: needs lines of the form 'option: value'")
    known = {f.name: f for f in fields(kind)}
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {file}: unknown option {key!r}; options are those of --help, with _ or -")
        found[name] = _checked(known[name], value, f"--config {file}: {key}")
    return found


def _checked(field: Any, value: Any, where: str) -> Any:
    """A YAML value as the field's type; its declared type is a string such as ``int | None``."""
    declared = str(field.type)
    if value is None and "None" in declared:
        return None
    if declared.startswith("Literal"):
        choices = get_args(eval(declared, {"Literal": Literal}))
        if value in choices:
            return value
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}")
    if declared.startswith("tuple") and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if declared == "bool" and isinstance(value, bool):
        return value
    if declared.startswith("int") and isinstance(value, int) and not isinstance(value, bool):
        return value
    if declared.startswith("float") and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if declared.startswith("str") and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    default = "" if field.default is MISSING else f" (as in {field.default!r})"
    raise ConfigError(f"{where}: {value!r} is not of type {declared}{default}")
