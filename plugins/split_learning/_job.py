"""The file of a training job: its keys, their defaults and rules. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from edged import ConfigError, TrainingKey

from .._training import file
from .._training.file import check, clients_of, key, server_of, texts_of, typed, unknown

TOPOLOGIES = (
    "label-sharing",
    "u-shape",
    "pipeline",
    "remote-blocks",
    "private-lora",
    "parallel-adapters",
)
SCHEDULES = ("sequential", "client-batch", "server-hierarchical")
CODECS = ("f32", "f16", "int8", "topk", "adatopk")
LOSSES = ("answer", "all")
WEIGHTS = ("f32", "bf16")
TUNES = ("adapter", "prompts")
CLIENTS_MAX = 32
LOCAL_KEYS = [  # the others are of no use to a job on one node
    *("model", "topology", "clients", "steps", "batch_size", "micro_batches", "max_length", "learning_rate"),
    *(
        "weight_decay",
        "r",
        "alpha",
        "target_modules",
        "dropout",
        "seed",
        "loss_on",
        "sparse",
        "width",
        "cache",
        "codec",
    ),
    *("gradient_checkpointing", "weights", "eval_every", "eval_rows", "checkpoint_every", "adapter"),
    "patience_s",
]


@dataclass(frozen=True, slots=True)
class Client:
    """A member that brings data. `node`: its name or id, "" for the node that the job is submitted to."""

    node: str = ""
    data: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A training job. The text after a default is what `edged config --explain` says of the key."""

    model: str = key("smollm2-135m-instruct-q4_1", "a stored model's name or hash")
    topology: str = key(
        "label-sharing",
        "who holds what: label-sharing, u-shape, pipeline, remote-blocks, private-lora or parallel-adapters",
    )
    clients: tuple[Client, ...] = key((), "[[clients]]: node and data of each member that brings rows")
    server: str = key("", "[server] node: who holds the rest of the model")
    stages: tuple[str, ...] = key((), "pipeline: nodes between the client and the server, in order")
    cut: int | str | tuple[int, ...] = key(
        3, 'blocks of the client (0: with prompts only); "auto": the planner\'s choice; of a pipeline a list'
    )
    tail: int = key(1, "u-shape: last blocks, with norm and head, on the client")
    steps: int = key(100, "optimiser steps")
    batch_size: int = key(4, "rows of each client in a step")
    micro_batches: int = key(1, "parts of a batch that are under way at once; a pipeline takes 8")
    max_length: int = key(128, "tokens of a row; the rest is cut off")
    learning_rate: float = key(5e-4, "of AdamW")
    weight_decay: float = key(0.0, "of AdamW")
    r: int = key(8, "rank of the adapter")
    alpha: float = key(16.0, "the adapter counts alpha / r times")
    target_modules: tuple[str, ...] = key(("q_proj", "v_proj"), "linear layers that get an adapter")
    dropout: float = key(0.0, "before the adapter")
    seed: int = key(0, "of the adapter's start, the order of rows, and noise")
    loss_on: str = key("answer", '"all": on the prompt\'s tokens, too')
    schedule: str = key("sequential", "several clients: sequential, client-batch or server-hierarchical")
    average_every: int = key(100, "steps between two means of the clients' adapters")
    codec: str = key(
        "f32",
        "of what travels: f32, f16, int8, topk or adatopk; of parallel-adapters f32 or f16, and kept so",
    )
    ratio: float = key(10.0, "topk, adatopk: one of so many values is sent")
    error_feedback: bool = key(True, "topk, adatopk: what was not sent of a gradient is added to the next")
    clip: float = key(0.0, "most that a row's hidden states may be long (L2); 0: as they are")
    noise: float = key(0.0, "standard deviation of what is added to them, in parts of clip")
    epsilon: float = key(0.0, "privacy budget; a job that would pass it is refused; 0: none")
    delta: float = key(1e-5, "of the budget")
    sparse: float = key(1.0, "part of the adapter's values that is tuned, chosen by the first gradient")
    tune: str = key("adapter", "remote-blocks: adapter of the client's own blocks, or prompts")
    prompt_tokens: int = key(16, "remote-blocks with prompts: how many")
    width: int = key(64, "parallel-adapters: of the side network")
    cache: int = key(4 << 30, "parallel-adapters: bytes of kept activations on the client's disk")
    gradient_checkpointing: bool = key(False, "less memory, a third more time")
    weights: str = key("f32", "of the frozen model in memory: f32 or bf16")
    eval_every: int = key(
        50, 'steps between evaluations on rows with split "test"; 0: at the start and the end'
    )
    eval_rows: int = key(64, "at most, of all clients")
    checkpoint_every: int = key(10, "steps between checkpoints")
    adapter: str = key("", 'its name; "": the file\'s')
    link_ratios: tuple[tuple[str, float], ...] = key((), "adatopk: of each link; the planner's own")
    patience_s: float = key(600.0, "how long a lost node is waited for")

    @property
    def prompts(self) -> int:
        """How many vectors stand before each row."""
        return self.prompt_tokens if self.tune == "prompts" else 0


DEFAULTS = Job()


def check_split(table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a split job's table; ConfigError names the key that is wrong."""
    job = read(table)
    rules = [
        (job.clients, "at least one [[clients]] with node and data"),
        (job.server, "[server] with a node"),
        (all(client.data for client in job.clients), "data for every client"),
        (
            len({client.node for client in job.clients}) == len(job.clients),
            "each client once; a node takes one part",
        ),
        (
            job.server not in [*(client.node for client in job.clients), *job.stages],
            "a server that is no client: a node takes one part",
        ),
        (job.topology == "pipeline" or not job.stages, 'stages with topology = "pipeline" only'),
        (
            len(job.clients) == 1 or job.topology in ("label-sharing", "u-shape"),
            f"one client with topology {job.topology!r}",
        ),
        (
            job.micro_batches == 1
            or (job.topology in ("label-sharing", "pipeline") and len(job.clients) == 1),
            "micro_batches = 1 but for label-sharing and pipeline with one client",
        ),
    ]
    check(rules)
    return to_table(job)


def check_local(table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job on one node; it has neither server nor cut."""
    table = dict(table)
    data = table.pop("data", None)
    if data is not None:
        table["clients"] = [{"data": data}]
    complete = set(table) >= {item.name for item in dataclasses.fields(Job)}  # checked once already
    for name in table:
        if name not in LOCAL_KEYS and not complete:
            raise unknown(name, [*LOCAL_KEYS, "data"])
    job = read(table)
    is_parallel = job.topology == "parallel-adapters"
    alone = is_parallel or job.topology == "label-sharing"
    check(
        [
            (alone, f"topology label-sharing or parallel-adapters on one node; {job.topology!r} came"),
            (len(job.clients) == 1 and job.clients[0].data, 'one data = "NAME"'),
            (is_parallel or job.codec == "f32", "codec f32: on one node nothing travels"),
        ]
    )
    return to_table(job)


def read(table: Mapping[str, Any]) -> Job:
    """A table of TOML, or settings that were read before, as a Job."""
    table = dict(table)
    fields = {item.name: item for item in dataclasses.fields(Job)}
    for name in table:
        if name not in fields:
            raise unknown(name, list(fields))
    if "server" in table:
        table["server"] = server_of(table["server"])
    if "clients" in table:
        table["clients"] = tuple(Client(**entry) for entry in clients_of(table["clients"], ("node", "data")))
    if "link_ratios" in table:
        table["link_ratios"] = _ratios(table["link_ratios"])
    for name in ("stages", "target_modules"):
        if name in table:
            table[name] = texts_of(name, table[name])
    if isinstance(table.get("cut"), list | tuple):
        table["cut"] = tuple(table["cut"])
    if table.get("topology") == "pipeline":
        table.setdefault("micro_batches", 8)
    job = Job(**{name: _typed(name, fields[name].default, value) for name, value in table.items()})
    check(_rules(job))
    return job


def to_table(job: Job) -> dict[str, Any]:
    """As it is stored and sent; `read` gives the same job again."""
    table = dataclasses.asdict(job)
    return table | {
        "clients": [dict(client) for client in table["clients"]],
        "stages": list(job.stages),
        "target_modules": list(job.target_modules),
        "link_ratios": [list(pair) for pair in job.link_ratios],
        "cut": list(job.cut) if isinstance(job.cut, tuple) else job.cut,
    }


def keys(kind: str) -> list[TrainingKey]:
    """What `edged config --explain` lists of a kind of job."""
    table = to_table(DEFAULTS)
    return [
        TrainingKey(item.name, table[item.name], item.metadata["text"])
        for item in dataclasses.fields(Job)
        if kind == "split" or item.name in LOCAL_KEYS
    ]


def _rules(job: Job) -> list[tuple[Any, str]]:
    one_of, least = partial(file.one_of, job), partial(file.least, job)
    return [
        one_of("topology", TOPOLOGIES),
        one_of("schedule", SCHEDULES),
        one_of("codec", CODECS),
        one_of("loss_on", LOSSES),
        one_of("weights", WEIGHTS),
        one_of("tune", TUNES),
        (len(job.clients) <= CLIENTS_MAX, f"at most {CLIENTS_MAX} clients"),
        (_is_cut(job), f'cut as a block number, "auto", or a list of a pipeline; {job.cut!r} came'),
        (job.target_modules, "target_modules with a name"),
        *(least(key, 1) for key in ("tail", "checkpoint_every", "average_every")),
        least("r", 1, 4096),
        least("width", 1, 65536),
        least("steps", 1, 1_000_000),
        least("batch_size", 1, 4096),
        least("micro_batches", 1, 256),
        least("max_length", 8, 1 << 17),
        least("ratio", 1, 1e6),
        least("prompt_tokens", 1, 4096),
        *(least(key, 0) for key in ("weight_decay", "clip", "noise", "epsilon", "eval_every", "eval_rows")),
        least("cache", 1 << 20),
        least("patience_s", 0),
        least("seed", 0, 2**31 - 1),
        (0 < job.learning_rate < 10, f"learning_rate above 0 and below 10; {job.learning_rate!r} came"),
        (0 < job.alpha < 1e6, f"alpha above 0; {job.alpha!r} came"),
        (0 <= job.dropout < 1, f"dropout from 0 to below 1; {job.dropout!r} came"),
        (0 < job.delta < 1, f"delta above 0 and below 1; {job.delta!r} came"),
        (0 < job.sparse <= 1, f"sparse above 0 and at most 1; {job.sparse!r} came"),
        (job.clip > 0 or not (job.noise or job.epsilon), "clip above 0 with noise or epsilon"),
        (job.noise > 0 or not job.epsilon, "noise above 0 with epsilon: without it nothing is private"),
        (not job.prompts or job.topology == "remote-blocks", 'tune = "prompts" with remote-blocks only'),
        *(_private_rules(job) if job.topology == "private-lora" else ()),
        *(_parallel_rules(job) if job.topology == "parallel-adapters" else ()),
    ]


def _private_rules(job: Job) -> list[tuple[Any, str]]:
    return [
        (not job.dropout, "dropout = 0 with private-lora: it has none"),
        (
            not job.gradient_checkpointing,
            "no gradient_checkpointing with private-lora: each exchange would happen twice",
        ),
    ]


def _parallel_rules(job: Job) -> list[tuple[Any, str]]:
    return [
        (job.codec in ("f32", "f16"), f"codec f32 or f16 with parallel-adapters; {job.codec!r} came"),
        (not job.dropout, "dropout = 0 with parallel-adapters: they have none"),
        (not job.clip, "clip = 0 with parallel-adapters: a row is sent once, and its states are kept"),
    ]


def _is_cut(job: Job) -> bool:
    if isinstance(job.cut, tuple):
        cuts = job.cut
        grows = all(a < b for a, b in itertools.pairwise(cuts))
        return job.topology == "pipeline" and grows and len(cuts) == len(job.stages) + 1 and min(cuts) >= 1
    return job.cut == "auto" or (isinstance(job.cut, int) and job.cut >= least_cut(job))


def least_cut(job: Job) -> int:
    """With prompts all blocks may be the server's."""
    return 0 if job.prompts else 1


def _typed(name: str, default: Any, value: Any) -> Any:
    """The value, if it is of its default's type."""
    if name in ("clients", "stages", "target_modules", "server", "link_ratios"):
        return value
    if name == "cut":
        numbers = value if isinstance(value, tuple) else (value,)
        if all(type(number) is int for number in numbers) or value == "auto":
            return value
    return typed(name, default, value)


def _ratios(value: Any) -> tuple[tuple[str, float], ...]:
    pairs = value if isinstance(value, list | tuple) else [None]
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or type(pair[1]) not in (int, float) or not 1 <= pair[1] < math.inf:
            raise ConfigError(
                f"expected link_ratios as pairs; {pair!r} came", remedy="leave them to the planner"
            )
    return tuple((str(link), float(ratio)) for link, ratio in pairs)
