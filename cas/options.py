"""What the command lines accept: frozen dataclasses, read by tyro from a YAML file and the flags that win over it."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import tyro
from tyro.conf import Positional, Suppress, arg

from cas.errors import ConfigError
from cas.option_files import from_yaml
from cas.option_values import memory as memory
from cas.option_values import store_folder as store_folder

_C = TypeVar("_C")
Flag = tyro.conf.FlagCreatePairsOff[bool]  # has no --no- form
Initialization = Literal["first", "sampled", "random", "matched"]
# Help shows an alias before the name, so the new spelling is the alias.
InitializationOption = Annotated[Initialization, arg(name="initialisation", aliases=("--initialization",))]
# 2506.06266, section 4.1. Stores, their hashes and the embedded reader's prompts have the British spelling.
KINDS = ("question", "structuring", "summarisation", "use case", "creative")
_STORED_KIND = {"summarization": "summarisation"}
KINDS_SHOWN = ("question", "structuring", "summarization", "use case", "creative")
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FICTIONAL = ("million_tokens",)  # collections that the reader in this package is for
READER = "reader"  # the small model in this package; it reads the fictional worlds of cas.data.worlds and nothing else
DEFAULT_SYSTEM = "Answer the question from the documents below. Keep the answer short."


@dataclass(frozen=True)
class Effort:
    """What one word says about self-study and training: conversations of a document, at least ``least`` and ``per_token``
    of its tokens, ``wordings`` of the embedded reader's questions, and ``epochs`` of training."""

    least: int
    per_token: float
    wordings: int
    epochs: float


EFFORTS = {
    "quick": Effort(24, 0.0, 1, 1.0),
    "standard": Effort(64, 0.25, 4, 4.0),
    "thorough": Effort(128, 0.5, 8, 8.0),
}

_AT_LEAST_1 = {"conversations", "wordings", "chunk_tokens", "questions_per_call", "calls_per_unit", "question_tokens"}
_AT_LEAST_1 |= {"answer_tokens", "top_k", "pool", "targets", "per_target", "rotate_every", "checkpoint_every"}
_AT_LEAST_1 |= {"max_new_tokens", "writer_concurrency", "exchange_every", "retrieve_k"}
_AT_LEAST_0 = {"guests", "max_distractors", "warmup", "steps"}
_SHARES = {"isolation", "rotate_fraction", "final_lr"}
_POSITIVE = {"lr", "epochs"}
_CHOICES = {"objective": ("distillation", "next-token"), "writer": ("auto", "sentence", "list", "none")}
_CHOICES |= {"reconstruction": ("on", "off"), "effort": ("quick", "standard", "thorough")}


class _Checked:
    """Refuses values of its options that make no sense, whoever gives them."""

    def __post_init__(self) -> None:
        """Raises: ConfigError that names the option."""
        for field in fields(cast(Any, self)):
            name, value = field.name, getattr(self, field.name)
            flag = f"--{name.replace('_', '-')} {value}"
            if value is None:
                continue
            if name in _AT_LEAST_1 and value < 1:
                raise ConfigError(f"{flag}: at least 1")
            if name in _AT_LEAST_0 and value < 0:
                raise ConfigError(f"{flag}: at least 0")
            if name in _SHARES and not 0 <= value <= 1:
                raise ConfigError(f"{flag}: from 0 to 1")
            if name in _POSITIVE and not 0 < value < math.inf:
                raise ConfigError(f"{flag}: more than 0")
            if value not in (choices := _CHOICES.get(name, (value,))):
                raise ConfigError(f"{flag}: choose {', '.join(choices[:-1])} or {choices[-1]}")
            if name == "kinds":
                kinds = tuple(_STORED_KIND.get(kind, kind) for kind in value)
                if not kinds or not set(kinds) <= set(KINDS):
                    unknown = ", ".join(sorted(set(kinds) - set(KINDS))) or "none given"
                    raise ConfigError(f"unknown kinds of seed prompt: {unknown}; choose from {', '.join(KINDS_SHOWN)}")
                object.__setattr__(self, name, kinds)


@dataclass(frozen=True)
class CollectionOptions:
    """What is trained on."""

    collection: str | None = None
    """A folder of documents, a .jsonl[.gz] file of {id, title, text}, or a named collection, such as million_tokens."""
    include: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Read only files of the folder that this glob matches, such as '*.md' or 'guides/**'."""
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Leave out files and folders that this glob matches, such as 'drafts/'."""
    collection_seed: int = 0
    """Seed of a generated collection (million_tokens, niah)."""
    documents: int | None = None
    """Use only the first so many documents (by id)."""
    merge: Flag = False
    """Merge the collection into one document: a monolithic cartridge."""
    prune: Flag = False
    """Drop documents that are no longer in the collection, with text, conversations and cartridge. Without it they stay."""


@dataclass(frozen=True)
class ModelOptions:
    """The frozen model."""

    model: str | None = None
    """Hub name, local folder or .gguf file of a decoder-only RoPE model, or `reader`, the small one in this package. Default
    reader for million_tokens, which is all it can read, else SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type of the frozen model; float16 on GPUs only."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    system: str = DEFAULT_SYSTEM
    """Instruction in front of the documents; part of the shared header."""


@dataclass(frozen=True)
class CartridgeOptions:
    """What a cartridge is, and its values before training."""

    tokens: int | None = None
    """Positions of every cartridge (a multiple of 4); instead of --ratio."""
    ratio: float | None = None
    """Document tokens per position; 16 if neither this nor --tokens is given."""
    span: int | None = None
    """Largest cartridge; with --ratio, longer documents are split. Default: what the longest document needs."""
    positions: Literal["fixed", "offset", "sequential"] = "fixed"
    """Where keys and tokens stand when several cartridges are loaded."""
    initialization: InitializationOption = "matched"
    """matched: keys picked from the document, values fitted to self-study (documents too long for one pass start as first);
    first: KV of the first tokens; sampled: KV of sampled chunks (SCI); random: noise."""


@dataclass(frozen=True)
class SelfStudy(_Checked):
    """The training conversations that the model writes."""

    effort: Literal["quick", "standard", "thorough"] = "standard"
    """What is not given by --conversations, --wordings and --epochs. quick: 24 conversations a document, 1 wording, 1 epoch;
    standard: a quarter of the tokens, at least 64, 4 wordings, 4 epochs; thorough: half of them, at least 128, 8 wordings,
    8 epochs. Reconstruction comes on top."""
    conversations: int | None = None
    """Written conversations to keep, of all documents; default by --effort, as far as their sentences allow; for the
    embedded reader --wordings of every kind about every sentence, as far as they differ."""
    wordings: int = 4
    """Questions of a kind that the embedded reader writes about a sentence; those after the first are the likeliest that differ."""
    chunk_tokens: int = 512
    """Tokens of text, in whole sentences, that the teacher sees at a time."""
    questions_per_call: int | None = None
    """Questions asked for in one call; they share its chunk and seed prompt. Default 32, or 20 in a list."""
    calls_per_unit: int | None = None
    """Calls in one file of conversations; what an interruption may lose. Default 2, or 8 that ask for lists."""
    question_tokens: int | None = None
    """Longer questions are dropped and counted. Default 64; the embedded reader 40."""
    answer_tokens: int | None = None
    """Longer answers are dropped and counted, never cut. Default 96, from a billion parameters 160, from three 256; the
    embedded reader 48."""
    kinds: Annotated[tuple[str, ...], arg(help_behavior_hint=f"(default: {shlex.join(KINDS_SHOWN)})")] = KINDS
    """Kinds of seed prompt."""
    top_k: int = 20
    """Most likely tokens whose probabilities are kept of the teacher."""
    keep_going: Flag = False
    """Go on with self-study even if less than a quarter of a run's first hundred questions, duplicates aside, is kept."""
    writer: Literal["auto", "sentence", "list", "none"] = "auto"
    """How questions are written: one a sentence, or as a list about a chunk. auto: a list where an instruct model of at
    least a billion parameters, or an endpoint, writes them. none: no questions, reconstruction alone."""
    reconstruction: Literal["on", "off"] = "on"
    """Conversations in which the model repeats or completes passages of the text, beside the questions; never with the
    embedded reader."""
    writer_url: str | None = None
    """An OpenAI-compatible endpoint (http://localhost:8000/v1) that writes the questions; --model answers them. Its key is
    read from $CAS_WRITER_KEY, else $OPENAI_API_KEY."""
    writer_model: str | None = None
    """Model that the endpoint writes with; default its only one."""
    writer_concurrency: int = 8
    """Requests to the endpoint at a time, at most --calls-per-unit."""
    seed: Suppress[int] = 0  # the flag is that of Training

    def __post_init__(self) -> None:
        """Raises: ConfigError for options about the writer that contradict each other."""
        super().__post_init__()
        if self.writer == "none" and self.reconstruction == "off":
            raise ConfigError("--writer none --reconstruction off: leaves no conversations; give one of them")
        if self.writer_model and not self.writer_url:
            raise ConfigError("--writer-model is the model of an endpoint; give its --writer-url")
        if self.writer_url is None:
            return
        if self.writer in ("sentence", "none"):
            raise ConfigError(f"--writer-url: an endpoint writes lists; leave out --writer {self.writer}")
        if re.search("[@?#]", self.writer_url):
            raise ConfigError("--writer-url: give the address alone; its key belongs in $CAS_WRITER_KEY")
        address = re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[!-~]*)?", self.writer_url, re.ASCII)
        if address is None or int((address[2] or ":80")[1:]) > 65535:
            raise ConfigError("--writer-url: give an address such as http://localhost:8000/v1")


@dataclass(frozen=True)
class Training(_Checked):  # those of the schedule are explained in cas.training.schedule.Schedule
    """Joint training."""

    epochs: float = 4.0
    """Passes over all conversations."""
    steps: int | None = None
    """Training steps; overrides --epochs."""
    lr: float = 2e-2
    """Peak learning rate of Adam."""
    warmup: int = 20
    """Steps of a cartridge's own until its learning rate peaks; at most half of its steps."""
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
    guests: Annotated[int, arg(aliases=("--frozen-distractors",))] = 0
    """Read-only cartridges from outside the pool among the distractors."""
    rotate_every: int = 10
    """Steps between rotations of the pool."""
    rotate_fraction: float = 0.5
    """Share of the pool that a rotation exchanges, most trained out, least trained in."""
    distractor_gradients: bool = True
    """Distractors in the pool learn as well: what is no target of the step at its next turn as target."""
    objective: Literal["distillation", "next-token"] = "distillation"
    """What the loss compares with: the teacher's probabilities, or its words."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class MemoryOptions:
    """How much memory training may take."""

    budget: str | None = None
    """All device memory that training may take, e.g. 6GiB; default no limit but the machine's."""
    host_memory: str = "0"
    """Memory for cartridges outside the pool, e.g. 2GiB; never changes a result."""


@dataclass(frozen=True)
class RanksOptions(_Checked):
    """Training by several processes: torchrun --nproc-per-node 8 -m cas.train ..., or deepspeed."""

    exchange_every: int | None = None
    """Steps after which documents are dealt out to the ranks anew, so that all of them meet. Default twice the documents of
    a rank, at most an eighth of its steps."""
    zero: Literal[0, 3] = 0
    """3: split the frozen model over the ranks (DeepSpeed's ZeRO-3), where one GPU cannot hold it; 0: each has all of it."""


@dataclass(frozen=True)
class OutputOptions:
    """The store, and how the command runs."""

    store: str | None = None
    """Folder of the cartridges; default $CAS_STORE, else runs/<collection>."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence embedder of the retrieval index."""
    config: str | None = None
    """A YAML file with any of these options; flags win over it."""
    dry_run: Flag = False
    """Print the plan and stop; writes nothing (but a GGUF model is unpacked, once)."""


@dataclass(frozen=True)
class TrainConfig(  # the fields of the last base come first
    OutputOptions, MemoryOptions, RanksOptions, Training, SelfStudy, CartridgeOptions, ModelOptions, CollectionOptions
):
    """Train a collection of cartridges: self-study, joint training, retrieval index. Resumes by itself."""

    def part(self, kind: type[_C]) -> _C:
        """The options of one group, such as :class:`Training`, by themselves."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(cast(Any, kind))})


@dataclass(frozen=True)
class QueryConfig(_Checked):
    """Answer questions from a trained collection. Without a question, a prompt that keeps the model loaded."""

    question: str | None = None
    """The question; may also stand bare, in quotes."""
    bare: Positional[tuple[str, ...]] = ()
    """The question, in quotes."""
    store: str | None = None
    """The store; default $CAS_STORE, else the newest under runs/."""
    retrieve_k: int = 4
    """Cartridges to retrieve and load."""
    documents: str | None = None
    """Load these documents' cartridges (ids, comma-separated) instead of retrieving."""
    max_new_tokens: int = 128
    """Longest answer."""
    json: Flag = False
    """Print one JSON object instead of text."""
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
        """The bare word is the question. Raises: ConfigError for several."""
        super().__post_init__()
        if len(self.bare) > 1:
            raise ConfigError(f'put the question into quotes: "{" ".join(self.bare)}"')
        if self.bare:
            object.__setattr__(self, "question", self.bare[0])


def parse(kind: type[_C], program: str, arguments: Sequence[str] | None = None) -> _C:
    """Flags (default: those of this process) over the YAML file of --config over what --effort stands for over defaults.

    Exits with status 2 for unknown or malformed flags, as argparse does. Raises: ConfigError for a bad value or YAML file.
    """
    config = _read(kind, program, arguments, {})
    file = getattr(config, "config", None)
    given = from_yaml(kind, file) if file else {}
    config = _read(kind, program, arguments, given) if given else config
    name = getattr(config, "effort", "standard")
    if name == "standard":  # the defaults
        return config
    effort = EFFORTS[name]
    return _read(kind, program, arguments, {"wordings": effort.wordings, "epochs": effort.epochs, **given})


def _read(kind: type[_C], program: str, arguments: Sequence[str] | None, defaults: dict[str, Any]) -> _C:
    """The flags over ``defaults``, {field: value}. The dataclasses that ``kind`` inherits from are the groups of ``--help``."""
    groups = {_title(base): base for base in reversed(kind.__bases__) if is_dataclass(base)}
    shape = make_dataclass(kind.__name__, groups.items()) if groups else kind

    def filled(group: Any) -> Any:
        return group(**{f.name: defaults[f.name] for f in fields(group) if f.name in defaults})

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            read: Any = tyro.cli(
                cast(Any, shape),
                prog=program,
                description=kind.__doc__,
                args=arguments,
                default=shape(**{title: filled(base) for title, base in groups.items()}) if groups else filled(kind),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if cause is not None:  # tyro exits for any ValueError; ours are one line already
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise
    if not groups:
        return cast(_C, read)
    parts = [getattr(read, title) for title in groups]  # the seed is in two; the later one, of Training, has the flag
    return kind(**{field.name: getattr(part, field.name) for part in parts for field in fields(part)})


def _title(group: type) -> str:
    """``SelfStudy``: self_study; ``ModelOptions``: model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", group.__name__.removesuffix("Options")).lower()
