"""Parallel adapters: the side network, what is kept of the frozen blocks, and the ranks that use both.

Most ranks here are the job on one node; those of a split talk over real channels on loopback, in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import wait_until

torch = pytest.importorskip("torch", reason="training needs torch: pip install edged[train]")
pytest.importorskip("transformers", reason="blocks need transformers: pip install edged[train]")

from edged_plugins._tensors.families import FAMILIES  # noqa: E402
from edged_plugins._training import sizes  # noqa: E402 - after the guards
from edged_plugins.split_learning import _cost  # noqa: E402
from edged_plugins.split_learning._job import check_local, check_split, read  # noqa: E402
from edged_plugins.split_learning._kept import HEAD, Kept  # noqa: E402
from edged_plugins.split_learning._parallel import Client  # noqa: E402
from edged_plugins.split_learning._places import Places  # noqa: E402
from edged_plugins.split_learning._side import Side  # noqa: E402
from edged_plugins.split_learning._trainer import load  # noqa: E402
from edged_plugins.torch_blocks._engine import Blocks  # noqa: E402
from edged_plugins.torch_blocks._memory_model import MemoryModel  # noqa: E402

from edged import ConfigError, ModelDescription, ProtocolError, Role, TrainingPlan, TrainingSpec  # noqa: E402
from edged.adapters import AdapterMeta, AdapterStore  # noqa: E402
from edged.channel import End, ZmqChannel  # noqa: E402
from edged.identity import Home  # noqa: E402

LAYERS, HIDDEN, VOCAB, WIDTH = 3, 64, 96, 16
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODEL = ModelDescription(
    architecture="llama", parameters=0, layers=LAYERS, hidden=HIDDEN, heads=4, kv_heads=2, head_dim=16,
    ffn=96, vocab=VOCAB, context_tokens=64, weight_type="F32", head_unit=1, ffn_unit=1, vocab_unit=1,
    layer_bytes=(0,) * LAYERS, embedding_bytes=0, head_bytes=0,
)  # fmt: skip
SHA = "a" * 64
ROWS, HELD_OUT, STEPS = 7, 2, 8  # epochs of four steps, the last of one row


class Words:
    """A tokenizer of numbers: "5 7" is [5, 7]."""

    vocab, end, sha256 = VOCAB, 1, "b" * 64

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
        ids = [x for m in messages for x in (2 if m["role"] == "user" else 3, *self.encode(m["content"]))]
        return [*ids, self.end] if answers else [*ids, 3]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def blocks() -> Blocks:
    return opened_blocks()


def opened_blocks() -> Blocks:
    found = Blocks(MemoryModel(FAMILIES["llama"], CONFIG))
    found.__dict__["tokenizer"] = Words()
    return found


def write_rows(path: Path) -> Path:
    draw = np.random.default_rng(7)
    lines = []
    for number in range(ROWS + HELD_OUT):
        texts = [" ".join(map(str, draw.integers(4, VOCAB, draw.integers(3, 24)))) for _ in range(2)]
        row: dict[str, Any] = {"instruction": texts[0], "output": texts[1]}
        lines.append(json.dumps(row | ({"split": "test"} if number >= ROWS else {})))
    path.write_text("\n".join(lines))
    return path


def job(**settings: Any) -> dict[str, Any]:
    table = {
        "topology": "parallel-adapters",
        "width": WIDTH,
        "batch_size": 2,
        "max_length": 40,
        "steps": STEPS,
        "learning_rate": 0.02,
        "eval_every": 4,
        "checkpoint_every": 1,
        "seed": 3,
    } | settings
    if "server" in table:
        return check_split(table | {"clients": [{"node": "one", "data": "rows"}]})
    return check_local(table | {"data": "rows"})


def spec_of(folder: Path, settings: Mapping[str, Any], rank: int = 0, **more: Any) -> TrainingSpec:
    whole = (0, 4), (0, 96), (0, VOCAB), 1.0
    roles = tuple(Role(i, f"{i}" * 64, i, (0, LAYERS), *whole) for i in range(2 if settings["server"] else 1))
    data = write_rows(folder / "rows.jsonl") if rank == 0 else ""
    state = folder / "job" / f"rank-{rank}"
    told = {"collector": 0, "model_name": "tiny", "model_sha256": SHA, "threads": 1} | more
    return TrainingSpec("job", settings, roles, rank, str(data), str(state), **told)


class NoChannel:
    """Of a job on one node."""

    rank, size, bytes_sent = 0, 1, 0


def local(folder: Path, blocks: Blocks, **settings: Any) -> Client:
    folder.mkdir(parents=True, exist_ok=True)
    found = load(spec_of(folder, job(**settings)), blocks, NoChannel())
    assert isinstance(found, Client)
    return found


class Heard:
    """A `report` that keeps all."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.evals: dict[int, float] = {}
        self.is_done = False

    def __call__(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if kind == "step":
            self.steps[step] = values
        elif kind == "eval":
            self.evals[step] = values["loss"]
        else:
            self.is_done = kind == "done"

    @property
    def losses(self) -> list[float]:
        return [self.steps[step]["loss"] for step in sorted(self.steps)]

    @property
    def computed(self) -> list[int]:
        return [int(self.steps[step]["computed_rows"]) for step in sorted(self.steps)]


def run(rank: Any, step: int = 0, until: int = 1 << 30) -> Heard:
    """To the end, or until so many steps were reported."""
    heard = Heard()
    rank.run(step, heard, lambda: len(heard.steps) >= until)
    return heard


def values_of(client: Client) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in client.parameters]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def shake(client: Client) -> None:
    """Values of which none is zero, so that every gradient is something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in client.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def gradients(client: Client, indices: Sequence[int]) -> list[torch.Tensor]:
    client._summed([client._training[index] for index in indices]).backward()
    found = []
    for parameter in client.parameters:
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


# --- the side network -------------------------------------------------------------------------------


def test_the_side_network_is_what_its_docstring_says() -> None:
    side = Side(LAYERS, HIDDEN, WIDTH, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    states = 10 * torch.randn(LAYERS + 1, 5, HIDDEN, generator=generator)
    d, u, v, e = (p.detach().double().numpy() for p in (side.down, side.inner, side.outer, side.up))
    h = states.double().numpy()
    n = h / (np.sqrt((h**2).mean(-1, keepdims=True)) + 1e-6)
    x = n[0] @ d[0]
    for layer in range(1, LAYERS + 1):
        a = x + n[layer] @ d[layer]
        x = a + torch.nn.functional.gelu(torch.from_numpy(a @ u[layer - 1])).numpy() @ v[layer - 1]
    assert np.allclose(side(states).detach().numpy(), h[-1] + x @ e, atol=1e-4)


def test_before_training_the_base_is_reproduced(blocks: Blocks, tmp_path: Path) -> None:
    client = local(tmp_path, blocks, loss_on="all")
    whole = blocks.span(0, LAYERS, embed=True, head=True)
    rows = client._training[:3]
    expected = 0.0
    for row in rows:
        logits = whole.project(whole(row.ids))[0, row.wanted]
        expected += torch.nn.functional.cross_entropy(logits, row.targets, reduction="sum").item()
    assert client._summed(rows).item() == pytest.approx(expected, abs=1e-4)


def test_it_learns(blocks: Blocks, tmp_path: Path) -> None:
    heard = run(local(tmp_path, blocks, steps=60, eval_every=0))
    assert sum(heard.losses[-4:]) < 0.5 * sum(heard.losses[:4])


def test_micro_batches_have_the_gradient_of_the_whole(blocks: Blocks, tmp_path: Path) -> None:
    one, many = (
        local(tmp_path / str(parts), blocks, micro_batches=parts, batch_size=4, steps=4) for parts in (1, 4)
    )
    assert run(one).losses == pytest.approx(run(many).losses, rel=1e-5)


# --- what is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("codec", ["f32", "f16"])
def test_gradients_are_those_without_the_cache_bit_for_bit(
    blocks: Blocks, tmp_path: Path, codec: str, threads: int
) -> None:
    client, plain = (local(tmp_path / name, blocks, codec=codec) for name in ("kept", "plain"))
    plain.kept = Kept(tmp_path / "none", 0, is_half=codec == "f16")
    torch.set_num_threads(threads)
    for one in (client, plain):
        shake(one)
    gradients(client, [0, 1, 2])
    assert client.computed_rows == 3
    for batch in ([0, 1, 2], [2, 0], [1]):  # in whatever company
        assert same(gradients(client, batch), gradients(plain, batch))
    assert (client.computed_rows, plain.computed_rows) == (3, 6)


def test_the_second_epoch_runs_no_block_and_the_backbone_gets_no_gradient(
    blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, forwards = [], list[int]()
    make = blocks.span

    def watched(*args: Any, **words: Any) -> Any:
        span = make(*args, **words)
        for block in span._blocks:
            block.register_forward_hook(lambda *_: forwards.append(1))
        spans.append(span)
        return span

    monkeypatch.setattr(blocks, "span", watched)
    client = local(tmp_path, blocks)
    heard = run(client)
    assert heard.computed == [2, 2, 2, 1, 0, 0, 0, 0]
    assert len(forwards) == LAYERS * (ROWS + HELD_OUT)  # every row once, those of three evaluations too
    assert len(heard.evals) == 3
    parameters = [parameter for span in spans for parameter in span.parameters()]
    assert parameters
    assert all(parameter.grad is None for parameter in parameters)


def test_the_blocks_leave_memory_when_all_rows_are_kept(blocks: Blocks, tmp_path: Path) -> None:
    client = local(tmp_path, blocks)
    assert client.spans
    run(client, until=4)
    assert client.spans
    run(client, until=5)
    assert not client.spans


@pytest.mark.parametrize(
    "change", ["model", "tokenizer", "max_length", "codec", "weights", "loss_on", "text"]
)
def test_keys_change_with(change: str, blocks: Blocks, tmp_path: Path) -> None:
    one = local(tmp_path, blocks)
    settings, more = job(), {}
    match change:
        case "model":
            more = {"model_sha256": "c" * 64}
        case "tokenizer":
            blocks.tokenizer.sha256 = "d" * 64
        case "text":
            blocks.tokenizer.encode = lambda text: [int(word) ^ 1 for word in text.split()]
        case _:
            settings = job(
                **{change: {"max_length": 39, "codec": "f16", "weights": "bf16", "loss_on": "all"}[change]}
            )
    other = load(spec_of(tmp_path, settings, **more), blocks, NoChannel())
    keys = [{row.key for row in client._training} for client in (one, other)]
    assert len(keys[0]) == len(keys[1]) == ROWS
    assert not keys[0] & keys[1]


def test_the_cache_is_bounded_and_nothing_makes_way(blocks: Blocks, tmp_path: Path) -> None:
    whole, bounded = local(tmp_path / "whole", blocks), local(tmp_path / "bounded", blocks)
    expected = run(whole)
    sizes = [bounded.kept.size_of((LAYERS + 1, len(row.wanted), HIDDEN)) for row in bounded._training]
    limit = sum(sizes) // 2
    bounded.kept = Kept(tmp_path / "bounded" / "job" / "states", limit, is_half=False)
    heard = Heard()
    for step in range(STEPS):
        bounded.step(step, heard)
    folder = tmp_path / "bounded" / "job" / "states"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= limit
    assert sum(heard.computed[:4]) == ROWS
    assert 0 < sum(heard.computed[4:]) < ROWS
    assert heard.losses == expected.losses
    assert same(values_of(bounded), values_of(whole))


def _flip(place: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 4
        file.write_bytes(content)

    return damage


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DAMAGES = {
    "a bit of the values": _flip(-9),
    "the shape": _flip(12),
    "the checksum": _flip(24),
    "the mark": _flip(0),
    "cut short": _cut,
    "cut within the head": lambda file: file.write_bytes(file.read_bytes()[: HEAD.size - 1]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "another row's": lambda file: file.write_bytes(sorted(file.parent.iterdir())[0].read_bytes()),
}


@pytest.mark.parametrize("codec", ["f32", "f16"])
def test_a_damaged_entry_is_computed_again(codec: str, blocks: Blocks, tmp_path: Path) -> None:
    client = local(tmp_path, blocks, codec=codec)
    shake(client)
    expected = gradients(client, range(ROWS))
    files = sorted((tmp_path / "job" / "states").iterdir())
    for name, damage in DAMAGES.items():
        before = client.computed_rows
        damage(files[3])
        assert same(gradients(client, range(ROWS)), expected), name
        assert client.computed_rows == before + 1, name
        assert same(gradients(client, range(ROWS)), expected), name
        assert client.computed_rows == before + 1, name


def test_a_full_disk_ends_the_keeping_and_not_the_job(
    tmp_path: Path, blocks: Blocks, caplog: pytest.LogCaptureFixture
) -> None:
    client, plain = local(tmp_path / "full", blocks), local(tmp_path / "plain", blocks)
    expected, heard = run(plain), Heard()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD.size + 100, hard))  # as a disk with no room for more
    try:
        for step in range(STEPS):
            client.step(step, heard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert heard.losses == expected.losses
    assert heard.computed == [2, 2, 2, 1] * 2
    assert [step for step, said in heard.steps.items() if "cache_failed" in said] == [0]
    assert len(caplog.records) == 1
    assert not list((tmp_path / "full" / "job" / "states").iterdir())


def test_what_is_kept_is_gone_when_the_job_is_done(blocks: Blocks, tmp_path: Path) -> None:
    client = local(tmp_path, blocks)
    run(client, until=STEPS - 1)
    assert len(list((tmp_path / "job" / "states").iterdir())) == ROWS + HELD_OUT
    assert run(client, client.checkpoints.steps[-1]).is_done
    assert not (tmp_path / "job" / "states").exists()


@pytest.mark.parametrize("at", [3, 6])
def test_a_run_resumed_from_a_checkpoint_has_the_same_bits(at: int, blocks: Blocks, tmp_path: Path) -> None:
    whole, first = local(tmp_path / "whole", blocks), local(tmp_path / "cut", blocks)
    expected = run(whole)
    run(first, until=at)
    again = local(tmp_path / "cut", blocks)
    heard = run(again, again.steps_kept[-1])
    assert heard.losses == expected.losses[again.steps_kept[-1] :]
    assert same(values_of(again), values_of(whole))
    assert again.computed_rows == (0 if at >= 4 else ROWS - 2 * at)


# --- a client and a server --------------------------------------------------------------------------


@contextlib.contextmanager
def channels() -> Iterator[list[ZmqChannel]]:
    ranks = [ZmqChannel(rank, 2, ("127.0.0.1",), range(1)) for rank in range(2)]
    try:
        port = ranks[0].listen([1])[1]
        ends = [End(ranks[1 - rank].public_key, "127.0.0.1", port if rank else 0) for rank in range(2)]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda rank: ranks[rank].open("group", {1 - rank: ends[rank]}), range(2)))
        yield ranks
    finally:
        for channel in ranks:
            channel.close()


def test_a_split_has_the_bits_of_one_node(blocks: Blocks, tmp_path: Path) -> None:
    alone = local(tmp_path / "alone", blocks)
    expected = run(alone)
    client, heard, _ = split_run(tmp_path / "split", {}, collector=0)
    assert heard.losses == expected.losses
    assert heard.evals == expected.evals
    assert same(values_of(client), values_of(alone))


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("codec", ["f32", "f16"])
def test_bytes_are_as_predicted_and_none_are_sent_after_the_first_epoch(
    codec: str, loss_on: str, tmp_path: Path
) -> None:
    settings = {"codec": codec, "loss_on": loss_on, "max_length": 64, "steps": 12}
    client, heard, sent = split_run(tmp_path, settings, collector=1)
    plan = TrainingPlan(client.spec.settings, client.spec.roles, collector=1)
    predicted = _cost.cost(plan, MODEL, [client.survey, {"adapter_values": 0}]).bytes_sent
    assert predicted == pytest.approx(sent["end"], rel=0.01)
    assert heard.computed == [2, 2, 2, 1] + [0] * 8
    assert sent["after 4"] == sent["after 11"]


def test_the_server_rests_and_comes_back_for_a_damaged_row(tmp_path: Path) -> None:
    seen: list[bool] = []

    def damage(step: int, server: Any) -> None:
        if step == 4:
            wait_until("the server rests", lambda: not server.spans)
            for file in (tmp_path / "job" / "states").iterdir():
                _cut(file)
        if step == 6:
            seen.append(bool(server.spans))

    _, heard, _ = split_run(tmp_path, {}, collector=0, each=damage)
    assert heard.computed == [2, 2, 2, 1, 0, 2, 2, 1]
    assert seen == [True]


def split_run(
    folder: Path,
    settings: Mapping[str, Any],
    collector: int,
    each: Callable[[int, Any], None] = lambda step, server: None,
) -> tuple[Client, Heard, dict[str, int]]:
    """A client and a server to their end; what the client reported; bytes of both at its steps."""
    folder.mkdir(exist_ok=True)
    table, sent, heard = job(server="two", **settings), dict[str, int](), Heard()
    with channels() as ends:
        ranks = [
            load(spec_of(folder, table, rank, collector=collector), opened_blocks(), ends[rank])
            for rank in range(2)
        ]

        def report(kind: str, step: int, values: Mapping[str, float]) -> None:
            heard(kind, step, values)
            if kind == "step":
                sent[f"after {step}"] = sum(end.bytes_sent for end in ends)
                each(step, ranks[1])

        with ThreadPoolExecutor(2) as threads:
            runs = [
                threads.submit(rank.run, 0, to, lambda: False)
                for rank, to in ((ranks[0], report), (ranks[1], Heard()))
            ]
            for done in runs:
                done.result(60)
        sent["end"] = sum(end.bytes_sent for end in ends)
    assert isinstance(ranks[0], Client)
    return ranks[0], heard, sent


@pytest.mark.parametrize(
    ("positions", "width", "expected"),
    [
        ([0, 8], HIDDEN, "below"),
        ([-1], HIDDEN, "below"),
        ([-100], HIDDEN, "positions"),
        ([], HIDDEN, "positions"),
        ([0], HIDDEN // 2, str(HIDDEN)),
    ],
)
def test_a_server_refuses_a_row_that_is_none(
    positions: list[int], width: int, expected: str, tmp_path: Path
) -> None:
    with channels() as ends:
        client, server = (
            load(spec_of(tmp_path, job(server="two"), rank), opened_blocks(), ends[rank]) for rank in range(2)
        )
        link = client.link(1)
        frame = np.array(positions, "<i4")
        link.send_tensor("ask", [0], torch.zeros(1, 8, width), "", [frame], do="row")
        with pytest.raises(ProtocolError, match=expected):
            server._answer(0)


# --- the job's file and the adapter's ---------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"codec": "topk"}, {"dropout": 0.1}])
def test_a_file_is_refused_with(setting: dict[str, Any]) -> None:
    (key,) = setting
    with pytest.raises(ConfigError, match=key):
        job(**setting)


def test_noise_is_refused_where_a_row_is_sent_once() -> None:
    with pytest.raises(ConfigError, match="clip"):
        job(server="two", clip=1.0)


@pytest.mark.parametrize("collector", [0, 1])
def test_the_adapter_is_stored_as_parallel_by_whichever_node_asked(collector: int, tmp_path: Path) -> None:
    client, _, _ = split_run(tmp_path, {"steps": 2}, collector)
    made = tmp_path / "job" / f"rank-{collector}" / "adapter"
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["edged_kind"], config["width"], config["layers"]) == ("parallel", WIDTH, LAYERS)
    assert "peft_type" not in config
    assert json.loads((made / "meta.json").read_text()) == {"kind": "parallel"}
    from safetensors.numpy import load_file

    for name, value in load_file(made / "adapter_model.safetensors").items():
        assert np.array_equal(value, client.side.get_parameter(name.removeprefix("side.")).detach().numpy())
    store = AdapterStore(Home(tmp_path / "home"))
    adapter = store.adopt(made, "mine", AdapterMeta(SHA, "tiny", kind="parallel"))
    assert (adapter.kind, adapter.r, store.find("mine").path) == ("parallel", WIDTH, "")


def test_the_price_knows_that_later_epochs_run_no_block(blocks: Blocks, tmp_path: Path) -> None:
    client = local(tmp_path, blocks, steps=400)
    plan = TrainingPlan(client.spec.settings, client.spec.roles, step_s=1.0)
    seconds = _cost.cost(plan, MODEL, [client.survey]).seconds
    parsed = read(client.spec.settings)
    every = _cost.flops_of(parsed, MODEL, Places(parsed, (), LAYERS).parts(0), 1.0)
    later = every - 2 * LAYERS * sizes.block_values(MODEL)
    assert seconds == pytest.approx(400 * later / every, rel=0.1)


def test_the_digest_of_rows_is_their_content_and_nothing_of_their_place(
    blocks: Blocks, tmp_path: Path
) -> None:
    one = local(tmp_path, blocks)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len({row.key for row in one._training}) == ROWS == len(lines) - HELD_OUT
    assert all(len(row.key) == hashlib.sha256().digest_size * 2 for row in one._training)
