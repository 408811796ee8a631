"""The file of a federated training job: its keys, their defaults and rules. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from edged import AggregatorEntry, TrainingKey, Travels

from .._training import file
from .._training.file import check, clients_of, key, server_of, texts_of, typed, unknown
from . import _client_privacy, _mode

CLIENTS_MAX = 32
LOSSES = ("answer", "all")
WEIGHTS = ("f32", "bf16")
PERSONAL = ("none", "dual", "ditto")
PARAMETERS = ("adapter", "all")
MODES = ("synchronous", "semi-synchronous")
CHOICE = ("only_charging", "battery_least", "celsius_most", "metered", "idle_s")
OBJECTIVES = ("sft", "dpo")
MASKED_LEAST = 3
WAIT_MOST_S = 86_400.0
CLIENT_KEYS = ("node", "data", "r", "alpha", "method", "learning_rate", "weight", "engine")
TORCH, LOSSES_ALONE = "torch_blocks", "shard"  # engines of a client: with gradients, and without


@dataclass(frozen=True, slots=True)
class Client:
    """A member that brings data. `r`, `alpha`, `learning_rate`: 0 for the job's. `method`: how it takes part,
    where not as the job says. `weight`: what its update counts; 0: as many rows as it trains on. `engine`:
    what computes it; "": torch_blocks, and shard where that is not and the method takes no gradients."""

    node: str = ""
    data: str = ""
    r: int = 0
    alpha: float = 0.0
    method: str = ""
    learning_rate: float = 0.0
    weight: int = 0
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A federated job. The text after a default is what `edged config --explain` says of the key."""

    model: str = key("smollm2-135m-instruct-q4_1", "a stored model's name or hash")
    method: str = key("flora", "how the server makes one adapter of many: {methods}")
    clients: tuple[Client, ...] = key(
        (),
        "[[clients]]: node and data of each member that brings rows; r, alpha, learning_rate, weight, method "
        '(fedkseed: it sends seeds alone) where not as the job says; engine = "shard": no PyTorch there',
    )
    server: str = key("", "[server] node: who aggregates; it sees adapters, never rows")
    mode: str = key(
        "synchronous",
        "synchronous: a round waits for all that train in it; semi-synchronous: for those that come in time",
    )
    server_engine: str = key("", 'what opens the model there; "": torch_blocks, or shard where that is not')
    collector_engine: str = key("", "likewise at who asked for the job, where it has no other part")
    rounds: int = key(
        4, "times that clients train and the server aggregates; fedbuff, delayed-nesterov: revisions"
    )
    fraction: float = key(
        1.0, "part of the clients that train in a round, drawn anew in each; the others rest"
    )
    local_steps: int = key(4, "optimiser steps of each client in a round")
    batch_size: int = key(4, "rows of each client in a step")
    max_length: int = key(128, "tokens of a row; the rest is cut off")
    learning_rate: float = key(5e-4, "of a client's AdamW, whose moments begin anew in each round")
    weight_decay: float = key(0.0, "of AdamW")
    r: int = key(8, "rank of the adapter")
    alpha: float = key(16.0, "the adapter counts alpha / r times")
    target_modules: tuple[str, ...] = key(("q_proj", "v_proj"), "linear layers that get an adapter")
    dropout: float = key(0.0, "before the adapter")
    seed: int = key(0, "of the adapter's start, and the order of rows")
    loss_on: str = key("answer", '"all": on the prompt\'s tokens, too')
    objective: str = key(
        "sft", "sft: learn answers; dpo: rows are pairs, prefer the chosen answer to the rejected"
    )
    beta: float = key(0.1, "dpo: how strongly the adapter is held to the model without it")
    rehearsal: float = key(
        0.0, 'part of each batch that are rows marked "rehearsal": true, against forgetting; 0: none'
    )
    gradient_checkpointing: bool = key(False, "less memory, a third more time")
    parameters: str = key(
        "adapter", "what is tuned: adapter, or all weights of the model by a method that sends seeds"
    )
    weights: str = key("f32", "of the frozen model in memory: f32 or bf16")
    eval_every: int = key(
        1, 'rounds between evaluations on rows with split "test"; 0: at the start and the end'
    )
    eval_rows: int = key(64, "at most, of all clients")
    personal: str = key(
        "", "an adapter that stays at each client: none, dual or ditto; fdlora has dual without being asked"
    )
    personal_steps: int = key(8, "dual: before the first round; ditto: in each round")
    personal_pull: float = key(0.1, "ditto: how strongly the personal adapter is drawn to the common one")
    fusion_rows: int = key(8, "dual: rows of its own on which a client weighs both adapters at the end")
    fusion_tries: int = key(16, "dual: pairs of weights that are tried")
    weight_most: int = key(0, "rows that a client counts for at most; 0: as many as it says")
    masked: bool = key(
        False, "the server learns the weighted mean of updates and no single one; of methods that are a sum"
    )
    mask_clip: float = key(1.0, "masked: the largest size of a value of an update; more is cut off")
    client_clip: float = key(0.0, "the longest change of a client in a round, over all its values; 0: any")
    client_noise: float = key(0.0, "noise on the sum of the clients' changes, in client_clips; 0: none")
    client_epsilon: float = key(
        0.0, "budget of a client's privacy; a job that would pass it is refused; 0: none"
    )
    client_delta: float = key(1e-5, "of the budget")
    quorum: float = key(0.5, "semi-synchronous: part of those asked without whose updates no round closes")
    wait_least_s: float = key(1.0, "semi-synchronous: a round waits at least so long")
    wait_most_s: float = key(
        600.0, "semi-synchronous: and at most so long, also for its quorum; then the epoch ends"
    )
    wait_spread: float = key(
        3.0, "semi-synchronous: between these the median of earlier arrivals, and so many median deviations"
    )
    only_charging: bool = key(False, "semi-synchronous: a client on its battery sits a round out")
    battery_least: float = key(0.0, "semi-synchronous: likewise below so many percent, unless it charges")
    celsius_most: float = key(0.0, "semi-synchronous: likewise above so many degrees; 0: at any")
    metered: bool = key(True, "semi-synchronous: may a client train whose link costs money by the byte?")
    idle_s: float = key(0.0, "semi-synchronous: a client trains when nobody has used it for so long")
    adapter: str = key("", 'its name; "": the file\'s')
    patience_s: float = key(600.0, "how long a lost node is waited for")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of the method alone

    @property
    def keeps(self) -> str:
        """What personal part there is: none, dual or ditto."""
        return self.personal or ("dual" if self.method == "fdlora" else "none")

    @property
    def is_whole(self) -> bool:
        """Are all weights of the model tuned, in place of an adapter?"""
        return self.parameters == "all"

    @property
    def is_semi(self) -> bool:
        return self.mode == "semi-synchronous"

    @property
    def r_most(self) -> int:
        """The largest r of any client: that of the start."""
        return max((client.r or self.r for client in self.clients), default=self.r)

    @property
    def rows_most(self) -> int:
        """Of a batch, as the model sees it: a pair has two."""
        return self.batch_size * (2 if self.objective == "dpo" else 1)

    def joins(self, rank: int) -> str:
        """The method by which a client takes part in a job with another; "" for the job's own."""
        method = self.clients[rank].method
        return method if method != self.method else ""

    def rate_of(self, rank: int) -> float:
        return self.clients[rank].learning_rate or self.learning_rate

    def engine_of(self, rank: int) -> str:
        """Of a client, of the server, or of who gets the adapter; "": not settled yet."""
        if rank < len(self.clients):
            return self.clients[rank].engine
        return self.server_engine if rank == len(self.clients) else self.collector_engine

    def r_of(self, rank: int) -> int:
        return self.clients[rank].r or self.r

    def alpha_of(self, rank: int) -> float:
        """Where a client has an r of its own and no alpha, the job's scale is kept."""
        client = self.clients[rank]
        return client.alpha or (self.alpha * client.r / self.r if client.r else self.alpha)

    def scale_of(self, rank: int) -> float:
        return self.alpha_of(rank) / self.r_of(rank)


DEFAULTS = Job()
OWN = ("options",)  # of the dataclass, and no key of a file


def check_federated(aggregators: Mapping[str, AggregatorEntry], table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a federated job's table; ConfigError names the key that is wrong."""
    job = read(table, aggregators)
    entry, ranks = aggregators[job.method], [job.r_of(rank) for rank in range(len(job.clients))]
    travels = entry.travels(1, ranks) if entry.travels else Travels()
    has_joined = any(job.joins(rank) for rank in range(len(job.clients)))
    least = entry.least(job.options) if entry.least else 1
    drawn = math.ceil(job.fraction * len(job.clients))
    joining = sorted(name for name, each in aggregators.items() if each.joins)
    for name in {job.method, *(job.joins(rank) for rank in range(len(job.clients)))} & aggregators.keys():
        look = aggregators[name].check
        if look is not None:
            look(job.options)
    check(
        [
            (job.clients, "at least one [[clients]] with node and data"),
            (job.server, "[server] with a node"),
            (
                all(not job.joins(rank) or job.joins(rank) in joining for rank in range(len(job.clients))),
                f"clients with the job's method, or one of {', '.join(joining) or 'none that is loaded'}",
            ),
            (
                not has_joined or not (entry.local or travels != Travels(travels.down, "AB", travels.stack)),
                f"no client with another method in a job of {job.method}, whose members send more or less "
                "than factors",
            ),
            (
                not entry.local
                or entry.after_gradients
                or not any(client.learning_rate for client in job.clients),
                f"one learning_rate for all clients with {job.method}: what is sent counts by it",
            ),
            (
                not travels.stack or job.weights == "f32",
                f"weights f32 with {job.method}: what is merged into narrower ones is lost",
            ),
            (
                not travels.stack or job.keeps == "none",
                f"personal = none with {job.method}: it moves the weights under a personal adapter",
            ),
            (
                not job.clients or drawn >= least,
                f"at least {least} clients in a round with {job.method}; {drawn} came",
            ),
            (all(client.data for client in job.clients), "data for every client"),
            (
                len({client.node for client in job.clients}) == len(job.clients),
                "each client once; a node takes one part",
            ),
            (
                job.server not in [client.node for client in job.clients],
                "a server that is no client: a node takes one part",
            ),
            (
                entry.unlike_ranks or len({job.r_of(rank) for rank in range(len(job.clients))}) == 1,
                f"one r for all clients: {job.method} averages factors; "
                f"{' or '.join(sorted(name for name, each in aggregators.items() if each.unlike_ranks))} "
                "take unlike ones",
            ),
            (
                entry.unlike_ranks or len({job.scale_of(rank) for rank in range(len(job.clients))}) == 1,
                f"one alpha for all clients with {job.method}",
            ),
            (
                not travels.stack or job.objective != "dpo",
                f"a method other than {job.method} with objective = dpo: it moves the weights that a "
                "preference is weighed against",
            ),
            *(
                (not why, f"engine = {TORCH!r} for client {number}; {LOSSES_ALONE} takes no part {why}")
                for number, client in enumerate(job.clients)
                if client.engine == LOSSES_ALONE
                for why in [without_gradients(aggregators, job, number)]
            ),
            *(_masked_rules(aggregators, job) if job.masked else ()),
            *(_whole_rules(aggregators, job) if job.is_whole else ()),
            *_mode.rules(job),
            *_client_privacy.rules(aggregators, job),
            *(_semi_rules(job, travels, least) if job.is_semi else ()),
        ]
    )
    return to_table(job)


def without_gradients(aggregators: Mapping[str, AggregatorEntry], job: Job, rank: int) -> str:
    """Why a client cannot do its part with losses alone, "in a job that ..."; "" where it can."""
    entry, ranks = aggregators[job.method], [job.r_of(rank) for rank in range(len(job.clients))]
    able = sorted(name for name, each in aggregators.items() if each.local and not each.after_gradients)
    reasons = [
        (
            bool(job.joins(rank)) or job.method in able,
            f"in a job of {job.method}, which takes gradients; {', '.join(able) or 'none loaded'} do not",
        ),
        (not job.is_whole, 'in a job with parameters = "all"'),
        (job.keeps == "none", "in a job with a personal adapter, which is trained by gradients"),
        (job.objective == "sft", f"in a job with objective = {job.objective}"),
        (
            not (entry.travels and entry.travels(1, ranks).stack),
            f"in a job of {job.method}, which moves the frozen weights",
        ),
    ]
    return next((why for holds, why in reasons if not holds), "")


def read(table: Mapping[str, Any], aggregators: Mapping[str, AggregatorEntry] | None = None) -> Job:
    """A table of TOML, or settings that were read before, as a Job. `aggregators`: the methods there are;
    None: of a job that was checked before."""
    table = dict(table)
    steps = table.pop("steps", None)  # as many as rounds: the daemon's word for them
    if steps is not None and steps != table.get("rounds"):
        raise unknown("steps", ["rounds"])
    check(
        [
            (isinstance(table.get("clients", []), list | tuple), "[[clients]] as tables"),
            (isinstance(table.get("options", {}), Mapping), "options as a table"),
            (isinstance(table.get("method", ""), str), "method as text"),
        ]
    )
    fields = {item.name: item for item in dataclasses.fields(Job)}
    options = dict(table.pop("options", {}))
    method = table.get("method", DEFAULTS.method)
    if aggregators is not None:
        known = sorted(aggregators)
        check([(method in known, f"method as one of {', '.join(known)}; {method!r} came")])
        joined = [entry.get("method") for entry in table.get("clients", ()) if isinstance(entry, Mapping)]
        brought = [aggregators[n].keys for n in joined if isinstance(n, str) and n in aggregators]
        own = {item.key: item for keys in (*brought, aggregators[method].keys) for item in keys}
        options = {name: item.default for name, item in own.items()} | options
        options |= {name: table.pop(name) for name in list(table) if name in own and name not in fields}
        options = {
            name: typed(name, own[name].default, value) for name, value in options.items() if name in own
        }
        for name in table:
            if name not in fields or name in OWN:
                raise unknown(name, [*(name for name in fields if name not in OWN), *own])
    if "server" in table:
        table["server"] = server_of(table["server"])
    if "clients" in table:
        table["clients"] = tuple(_client(entry) for entry in clients_of(table["clients"], CLIENT_KEYS))
    if "target_modules" in table:
        table["target_modules"] = texts_of("target_modules", table["target_modules"])
    special = ("clients", "server", "target_modules")
    values = {
        name: value if name in special else typed(name, fields[name].default, value)
        for name, value in table.items()
    }
    job = Job(**values, options=options)
    check(_rules(job))
    return job


def to_table(job: Job) -> dict[str, Any]:
    """As it is stored and sent; `read` gives the same job again."""
    table = dataclasses.asdict(job)
    return table | {
        "clients": [dict(client) for client in table["clients"]],
        "target_modules": list(job.target_modules),
        "options": dict(job.options),
        "steps": job.rounds,
    }


def keys(aggregators: Mapping[str, AggregatorEntry]) -> list[TrainingKey]:
    """What `edged config --explain` lists of a federated job."""
    table, methods = to_table(DEFAULTS), ", ".join(sorted(aggregators))
    found = [
        TrainingKey(item.name, table[item.name], item.metadata["text"].format(methods=methods))
        for item in dataclasses.fields(Job)
        if item.name not in OWN
    ]
    own: dict[str, TrainingKey] = {}
    for name, entry in sorted(aggregators.items()):
        for item in entry.keys:
            own.setdefault(item.key, TrainingKey(item.key, item.default, f"{name}: {item.text}"))
    return found + list(own.values())


def _client(entry: Mapping[str, Any]) -> Client:
    values = {name: typed(f"clients.{name}", getattr(Client(), name), value) for name, value in entry.items()}
    return Client(**values)


def _rules(job: Job) -> list[file.Rule]:
    one_of, least = partial(file.one_of, job), partial(file.least, job)
    return [
        one_of("loss_on", LOSSES),
        one_of("weights", WEIGHTS),
        one_of("parameters", PARAMETERS),
        one_of("mode", MODES),
        *(
            (
                job.is_semi or getattr(job, name) == getattr(DEFAULTS, name),
                f"mode = semi-synchronous with {name}; a synchronous round waits for whoever was drawn",
            )
            for name in CHOICE
        ),
        (0 < job.quorum <= 1, f"quorum above 0 and at most 1; {job.quorum!r} came"),
        (
            0 < job.wait_least_s <= job.wait_most_s <= WAIT_MOST_S,
            f"0 < wait_least_s <= wait_most_s <= {WAIT_MOST_S:.0f}; "
            f"{job.wait_least_s:g} and {job.wait_most_s:g} came",
        ),
        least("wait_spread", 0, 1e6),
        least("battery_least", 0, 100),
        least("celsius_most", 0, 200),
        least("idle_s", 0, 1e6),
        one_of("objective", OBJECTIVES),
        (0 < job.beta <= 1e3, f"beta above 0, up to 1000; {job.beta!r} came"),
        (job.objective != "dpo" or job.loss_on == "answer", "loss_on = answer with objective = dpo"),
        (0 <= job.rehearsal < 1, f"rehearsal from 0 to below 1; {job.rehearsal!r} came"),
        (
            not job.rehearsal or _is_whole(job.rehearsal * job.batch_size, job.batch_size),
            f"rehearsal x batch_size as whole rows, from 1 to all but one; {job.rehearsal:g} x "
            f"{job.batch_size} came",
        ),
        (
            all(client.engine in ("", TORCH, LOSSES_ALONE) for client in job.clients),
            f"engine of a client as {TORCH} or {LOSSES_ALONE}",
        ),
        one_of("server_engine", ("", TORCH, LOSSES_ALONE)),
        one_of("collector_engine", ("", TORCH, LOSSES_ALONE)),
        one_of("personal", ("", *PERSONAL)),
        (job.personal in ("", "dual") or job.method != "fdlora", "personal = dual with fdlora"),
        least("personal_steps", 1, 100_000),
        least("personal_pull", 0, 1e3),
        least("fusion_rows", 1, 4096),
        least("fusion_tries", 3, 1000),
        (len(job.clients) <= CLIENTS_MAX, f"at most {CLIENTS_MAX} clients"),
        (job.target_modules, "target_modules with a name"),
        (len(set(job.target_modules)) == len(job.target_modules), "each of target_modules once"),
        least("rounds", 1, 100_000),
        (0 < job.fraction <= 1, f"fraction above 0 and at most 1; {job.fraction!r} came"),
        least("local_steps", 1, 100_000),
        least("r", 1, 4096),
        least("batch_size", 1, 4096),
        least("max_length", 8, 1 << 17),
        *(
            least(name, 0)
            for name in ("weight_decay", "eval_every", "eval_rows", "weight_most", "patience_s")
        ),
        least("seed", 0, 2**31 - 1),
        (0 < job.learning_rate < 10, f"learning_rate above 0 and below 10; {job.learning_rate!r} came"),
        (0 < job.mask_clip <= 1e6, f"mask_clip above 0, up to 1e6; {job.mask_clip!r} came"),
        (0 < job.alpha < 1e6, f"alpha above 0; {job.alpha!r} came"),
        (0 <= job.dropout < 1, f"dropout from 0 to below 1; {job.dropout!r} came"),
        (
            all(0 <= client.r <= 4096 and 0 <= client.alpha < 1e6 for client in job.clients),
            "r from 1 to 4096 and alpha above 0 for every client that has its own",
        ),
        (
            all(0 <= client.learning_rate < 10 and 0 <= client.weight <= 1 << 40 for client in job.clients),
            "learning_rate from 0 to below 10, and weight from 0 to 2^40, for every client",
        ),
    ]


def _is_whole(rows: float, all_rows: int) -> bool:
    return abs(rows - round(rows)) < 1e-6 and 0 < round(rows) < all_rows


def _masked_rules(aggregators: Mapping[str, AggregatorEntry], job: Job) -> list[file.Rule]:
    sums = ", ".join(sorted(name for name, entry in aggregators.items() if entry.is_sum))
    return [
        (
            aggregators[job.method].is_sum,
            f"with masked = true a method that needs no more than the sum of updates: {sums}; "
            f"{job.method} does",
        ),
        (
            len(job.clients) >= MASKED_LEAST,
            f"at least {MASKED_LEAST} clients with masked = true; of two, each learns the other's update",
        ),
        (
            not any(job.joins(rank) for rank in range(len(job.clients))),
            "the job's method of every client with masked = true: all sums are of one kind",
        ),
        (job.fraction == 1, "fraction = 1 with masked = true: all members mask in each round"),
        (
            job.options.get("seed_sampling") != "amplitude",
            "seed_sampling = uniform with masked = true; amplitudes are of single updates",
        ),
    ]


def _whole_rules(aggregators: Mapping[str, AggregatorEntry], job: Job) -> list[file.Rule]:
    able = ", ".join(sorted(name for name, entry in aggregators.items() if entry.whole)) or "none loaded"
    unlike = [
        name
        for name in ("r", "alpha", "target_modules", "dropout", "weight_decay")
        if getattr(job, name) != getattr(DEFAULTS, name)
    ]
    return [
        (
            bool(aggregators[job.method].whole),
            f'parameters = "adapter" with {job.method}, which sends factors; "all" is for {able}',
        ),
        (
            not any(job.joins(rank) for rank in range(len(job.clients))),
            'the job\'s method of every client with parameters = "all"',
        ),
        (
            job.weights == "f32",
            f'weights f32 with parameters = "all": what a step moves is lost in {job.weights}',
        ),
        (job.keeps == "none", 'personal = none with parameters = "all": there is no adapter'),
        (
            job.objective == "sft",
            'objective = sft with parameters = "all": without an adapter there is nothing to weigh against',
        ),
        (
            not unlike and not any(client.r or client.alpha for client in job.clients),
            f'no {", ".join(unlike) or "r or alpha of a client"} with parameters = "all"',
        ),
    ]


def _semi_rules(job: Job, travels: Travels, least: int) -> list[file.Rule]:
    quorum = math.ceil(job.quorum * math.ceil(job.fraction * len(job.clients)) - 1e-9)
    return [
        (
            not travels.stack,
            f"mode = synchronous with {job.method}: who misses a round misses for good what it merged",
        ),
        (
            job.method != "scaffold",
            "mode = synchronous with scaffold: its server has the mean of what members hold, and an update "
            "that is lost parts them for good",
        ),
        (not job.masked, "mode = synchronous with masked = true: keys and shares are agreed on by all"),
        (
            not job.client_noise or job.fraction == 1,
            "fraction = 1 with client_noise and mode = semi-synchronous: who is drawn there depends on who "
            "is away, and the budget counts by the draw",
        ),
        (
            quorum >= least,
            f"a quorum of at least {least} clients with {job.method}; {quorum} of them close a round",
        ),
    ]
