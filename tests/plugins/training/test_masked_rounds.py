"""Rounds whose sums are masked: what they make, what the server sees, and members that drop out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds import masks, shamir
from edged_plugins._rounds.fixed_point import FixedPoint
from edged_plugins._rounds.masking import Masker
from edged_plugins._tensors.adapters import read_peft
from edged_plugins.personal_lora import _messages
from edged_plugins.personal_lora._job import read
from edged_plugins.personal_lora._masked import REVEALED, keep_revealed
from rig import Outcome, Planned, finished, kept_by, raised, run_threads
from rounds_rig import AGGREGATORS, TRAINING, federated

from edged import ConfigError, EngineError, PolicyViolation

THREE, FOUR, TEN = ({},) * 3, ({},) * 4, ({},) * 10
SUMS = {name for name, entry in AGGREGATORS.items() if entry.is_sum}
ULP = 2.0**-23  # of F32, at 1
SCALE = 2.0  # alpha / r of the rig's jobs
Factors = dict[str, tuple[np.ndarray, np.ndarray]]
Found = dict[tuple[int, int], Factors]  # by round and rank


def watching(found: Found, size: int) -> dict[int, Callable[[Any], None]]:
    """Changes that keep what each member has trained in each round."""

    def change(trainer: Any) -> None:
        real = trainer._tell

        def tell(number: int, figures: list[float]) -> None:
            factors = {name: (a.copy(), b.copy()) for name, (a, b) in trainer.model.factors().items()}
            found[number, trainer.rank] = factors
            real(number, figures)

        trainer._tell = tell

    return dict.fromkeys(range(size), change)


def weights_of(outcomes: Sequence[Outcome]) -> list[int]:
    return [outcome.survey["weight"] for outcome in outcomes[:-1]]


def mean_of(found: Found, weights: Mapping[int, int]) -> Factors:
    """The oracle: sum w P / sum w of the first round, in F64."""
    total = sum(weights.values())
    return {
        name: tuple(  # type: ignore[misc]
            sum(w * found[0, rank][name][side].astype(np.float64) for rank, w in weights.items()) / total
            for side in (0, 1)
        )
        for name in found[0, min(weights)]
    }


def made_by(plan: Planned) -> dict[str, np.ndarray]:
    _, tensors = read_peft(plan.folders[-1] / "adapter")
    return dict(tensors)


def assert_is_mean(plan: Planned, mean: Factors, bound: float) -> None:
    """The adapter that was written is this one, but for `bound` and one rounding to F32."""
    made = made_by(plan)
    assert len(made) == 2 * len(mean)
    for name, pair in mean.items():
        for side, (letter, scale) in enumerate((("A", 1.0), ("B", SCALE))):
            [value] = [made[key] for key in made if f"{name}.lora_{letter}." in key]
            allowed = scale * (bound + ULP * np.abs(pair[side]))
            assert (np.abs(value - scale * pair[side]) <= allowed).all()


@dataclasses.dataclass
class Both:
    """The same job of one round with masks and without; `trained`: by members, in either."""

    plans: tuple[Planned, Planned]
    outcomes: tuple[list[Outcome], list[Outcome]]
    trained: tuple[Found, Found]


@pytest.fixture(scope="module")
def both(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    plans = tuple(
        federated(tiny("llama")[1], folder / str(masked), clients=THREE, rounds=1, masked=masked)
        for masked in (True, False)
    )
    trained: tuple[Found, Found] = ({}, {})
    outcomes = tuple(
        [*finished(run_threads(plan, keep="messages", changes=watching(found, 3)))]
        for plan, found in zip(plans, trained, strict=True)
    )
    return Both(plans, outcomes, trained)  # type: ignore[arg-type]


def test_a_masked_job_makes_the_mean_of_updates_within_the_bound_of_its_numbers(both: Both) -> None:
    masked, plain = both.plans
    weights = dict(enumerate(weights_of(both.outcomes[0])))
    bound = FixedPoint(3, 1.0, _messages.WEIGHT_MOST).error(sum(weights.values()))
    assert bound < ULP
    mean = mean_of(both.trained[0], weights)
    assert_is_mean(masked, mean, bound)
    assert_is_mean(plain, mean, 0.0)


def test_the_server_gets_no_row_of_a_members_factors_though_without_masks_it_gets_all(both: Both) -> None:
    """Neither as F32 nor as the integers that are masked."""
    rows = [
        [
            row.astype("<f4")
            for (number, _), factors in found.items()
            if number == 0
            for a, b in factors.values()
            for row in (*a, *b)
            if row.any()
        ]
        for found in both.trained
    ]
    blobs = [b"".join(f for _, _, frames in out[-1].received for f in frames) for out in both.outcomes]
    masked, plain = rows
    assert len(masked) == len(plain) > 300
    assert all(row.tobytes() in blobs[1] for row in plain)
    assert not any(row.tobytes() in blobs[0] for row in masked)
    fixed = FixedPoint(3, 1.0, _messages.WEIGHT_MOST)
    for weight in weights_of(both.outcomes[0]):
        assert not any(fixed.encode(row, weight)[0][:-1].tobytes() in blobs[0] for row in masked)


def test_there_is_no_residual_of_masked_updates_and_losses_are_told(both: Both) -> None:
    [masked], [plain] = (
        [values for kind, _, values in out[-1].reports if kind == "step"] for out in both.outcomes
    )
    assert "residual" in plain
    assert "residual" not in masked
    assert masked["loss"] == plain["loss"]
    assert {header["k"] for _, header, _ in both.outcomes[0][-1].received} == {
        *("hello", "keys", "shares", "masked", "told", "reveal")
    }


@pytest.mark.parametrize(
    ("method", "table"),
    [
        ("fedavg", {}),
        ("fedkseed", {"seeds": 64, "learning_rate": 2e-4, "mask_clip": 1e5, "local_steps": 4}),
    ],
)
def test_the_bytes_of_a_masked_job_are_predicted(
    method: str, table: dict[str, Any], tiny: Any, processes: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method=method, clients=THREE, masked=True, **table)
    ran = processes.run(plan)
    finished(ran.outcomes)
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)
    job, server = read(plan.plan.settings), ran.outcomes[-1]
    shapes = server.survey["shapes"]
    for number, values in [(at, values) for kind, at, values in server.reports if kind == "step"]:
        travels = _messages.travels_of(AGGREGATORS[method], number, [4, 4, 4])
        expected = _messages.down_bytes(job, number, travels, 4, shapes)
        expected += _messages.masked_bytes(job, number, travels, 4, shapes)
        for rank in range(3):
            told = values[f"up_{rank}"] + values[f"down_{rank}"]
            assert told == pytest.approx(expected, rel=0.01)


def test_the_sizes_of_the_prediction_are_those_of_the_protocol() -> None:
    assert _messages.KEYS_BYTES == masks.KEYS_BYTES
    assert _messages.SEALED_BYTES == masks.SEALED_BYTES
    assert _messages.SHARE_BYTES == shamir.SHARE_BYTES


def test_seeds_that_are_summed_under_masks_make_the_adapter_of_seeds_in_clear(
    tiny: Any, tmp_path: Path
) -> None:
    made = []
    for masked in (True, False):
        plan = federated(
            tiny("llama")[1],
            tmp_path / str(masked),
            method="fedkseed",
            clients=THREE,
            rounds=1,
            local_steps=6,
            seeds=16,
            learning_rate=1e-3,
            mask_clip=1e5,
            masked=masked,
        )
        server = finished(run_threads(plan, keep="messages"))[-1]
        kinds = {header["k"] for _, header, _ in server.received}
        assert ("extras" in kinds) is not masked
        made.append(made_by(plan))
    one, other = made
    moved = max(np.abs(value).max() for name, value in one.items() if "lora_B" in name)
    assert moved > 1e-4  # B begins at 0
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5 * moved)


QUICK: dict[str, Any] = {"rounds": 1, "local_steps": 1, "eval_rows": 3, "batch_size": 2}
DUAL = {"personal_steps": 1, "fusion_rows": 1, "fusion_tries": 3}


@pytest.mark.parametrize("method", ["fdlora", "fedadam", "fedprox", "ffa", "mezo"])
def test_a_sum_of_factors_makes_the_same_adapter_under_masks(method: str, tiny: Any, tmp_path: Path) -> None:
    made = []
    for masked in (True, False):
        table = QUICK | (DUAL if method == "fdlora" else {})
        plan = federated(
            tiny("llama")[1], tmp_path / str(masked), method=method, clients=THREE, masked=masked, **table
        )
        finished(run_threads(plan))
        made.append(made_by(plan))
    one, other = made
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-6)


def test_what_is_beyond_the_clip_is_cut_off_and_the_members_log_says_so(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=THREE, masked=True, mask_clip=0.01, **QUICK)
    finished(run_threads(plan))
    assert max(np.abs(value).max() for name, value in made_by(plan).items() if "lora_A" in name) <= 0.0101
    assert [record.message for record in caplog.records].count("values cut at mask_clip") == 3


# --- members that drop out ------------------------------------------------------------------------

Send = Callable[..., None]


def wrongly(say: Callable[[Send, int, dict[str, Any], Any], None], kind: str, number: int = 0) -> Any:
    """A change: in this round `say(send, to, header, frames)` comes in place of what a member sends of a
    kind."""

    def change(trainer: Any) -> None:
        class Spoiled:
            def __init__(self, channel: Any) -> None:
                self._channel = channel

            def __getattr__(self, name: str) -> Any:
                return getattr(self._channel, name)

            def send(self, to: int, header: dict[str, Any], frames: Any = ()) -> None:
                if header["k"] == kind and header["at"] == [number]:
                    say(self._channel.send, to, dict(header), frames)
                else:
                    self._channel.send(to, header, frames)

        trainer.channel = Spoiled(trainer.channel)

    return change


def shorter(send: Send, to: int, header: dict[str, Any], frames: Any) -> None:
    send(to, header, [bytes(frame)[8:] for frame in frames])


def no(send: Send, to: int, header: dict[str, Any], frames: Any) -> None:
    send(to, header | {"k": "no"})


def another(send: Send, to: int, header: dict[str, Any], frames: Any) -> None:
    send(to, header | {"k": "upp"}, frames)


def test_a_round_of_ten_is_unmasked_though_three_drop_out(tiny: Any, tmp_path: Path) -> None:
    """They agreed on keys, so their masks are in the others' values, and are taken out again."""
    plan = federated(tiny("llama")[1], tmp_path, clients=TEN, rounds=1, local_steps=1, masked=True)
    found: Found = {}
    changes = watching(found, 10)
    for rank, say in ((1, shorter), (4, no), (8, another)):
        spoil, watch = wrongly(say, "masked"), changes[rank]
        changes[rank] = lambda trainer, spoil=spoil, watch=watch: (spoil(trainer), watch(trainer))
    outcomes = finished(run_threads(plan, changes=changes))
    weights = {rank: w for rank, w in enumerate(weights_of(outcomes)) if rank not in (1, 4, 8)}
    bound = FixedPoint(10, 1.0, _messages.WEIGHT_MOST).error(sum(weights.values()))
    assert_is_mean(plan, mean_of(found, weights), bound)
    [step] = [values for kind, _, values in outcomes[-1].reports if kind == "step"]
    assert step["refused"] == 3
    assert {key for key in step if key.startswith("up_")} == {f"up_{rank}" for rank in weights}


@pytest.mark.parametrize("kind", ["keys", "shares", "masked", "reveal"])
def test_a_member_that_is_wrong_at_a_step_costs_itself_and_takes_part_in_the_next_round(
    kind: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=FOUR, local_steps=1, eval_every=0, masked=True)
    outcomes = finished(run_threads(plan, changes={2: wrongly(shorter, kind)}))
    first, second = [values for said, _, values in outcomes[-1].reports if said == "step"]
    assert first["refused"] == second["refused"] == 1
    assert ("up_2" in first) is (kind == "reveal")  # its values were in the sum by then
    assert "up_2" in second


def test_a_member_that_cannot_mask_leaves_the_round_by_itself(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=FOUR, local_steps=1, eval_every=0, masked=True)

    def one_more(trainer: Any) -> None:
        real = trainer._masked

        def made(number: int, frozen: str) -> Any:
            part = real(number, frozen)
            send = part.send
            part.send = lambda values, weight: send(values if number else np.append(values, values), weight)
            return part

        trainer._masked = made

    outcomes = finished(run_threads(plan, keep="messages", changes={2: one_more}))
    first, second = [values for said, _, values in outcomes[-1].reports if said == "step"]
    assert "up_2" not in first
    assert "up_2" in second
    assert [source for source, header, _ in outcomes[-1].received if header["k"] == "no"] == [2]


def test_a_round_of_too_few_ends_the_job_and_nothing_is_unmasked(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=THREE, local_steps=1, masked=True)
    server = run_threads(plan, changes={1: wrongly(no, "masked")})[-1]
    assert isinstance(server.error, PolicyViolation)
    assert server.error.code == "mask-few"
    assert not kept_by(plan)[-1]


def test_members_whom_a_server_sent_unlike_adapters_do_not_mask_together(tiny: Any, tmp_path: Path) -> None:
    """Of many that learned nothing and one that did the mean would be that one's update."""
    plan = federated(tiny("llama")[1], tmp_path, clients=THREE, local_steps=1, masked=True)

    def lies(server: Any) -> None:
        real = server.aggregator.download

        def download(member: Any) -> Any:
            found = real(member)
            if member.rank != 2:
                return found
            zeros = {name: (0 * a, 0 * b) for name, (a, b) in found.factors.items()}
            return dataclasses.replace(found, factors=zeros)

        server.aggregator.download = download

    server = run_threads(plan, keep="messages", changes={3: lies})[-1]
    assert isinstance(server.error, PolicyViolation)
    assert "masked" not in {header["k"] for _, header, _ in server.received}


def test_a_server_that_gives_a_member_keys_of_its_own_is_found_out(tiny: Any, tmp_path: Path) -> None:
    """It would know every mask of a member to whom it is all the others."""
    plan = federated(tiny("llama")[1], tmp_path, clients=THREE, local_steps=1, masked=True)
    terms = masks.Terms((0, 1, 2), 1, FixedPoint(3, 1.0, 1.0), b"another")

    def lies(send: Send, to: int, header: dict[str, Any], frames: Any) -> None:
        [keys] = map(bytes, frames)
        send(to, header, [keys[:96] + Masker(terms, 1).keys() + keys[192:] if to == 0 else keys])

    server = run_threads(plan, keep="messages", changes={3: wrongly(lies, "keys")})[-1]
    assert isinstance(server.error, PolicyViolation)
    assert {header["k"] for _, header, _ in server.received} == {"hello", "keys", "no"}


# --- going on -------------------------------------------------------------------------------------


def keys_of(outcomes: Sequence[Outcome]) -> dict[int, bytes]:
    return {
        source: b"".join(frames)
        for source, header, frames in outcomes[-1].received
        if header["k"] == "keys" and header["at"] == [1]
    }


def test_a_round_that_is_done_again_has_fresh_keys_and_the_same_bits(tiny: Any, tmp_path: Path) -> None:
    """It breaks when all have revealed and nobody has kept the round."""
    plans = [
        federated(tiny("llama")[1], tmp_path / name, clients=THREE, local_steps=1, masked=True)
        for name in ("whole", "broken")
    ]
    finished(run_threads(plans[0]))

    def breaks(server: Any) -> None:
        real = server.aggregator.finish

        def finish() -> None:
            real()
            if server.checkpoints.steps == [1]:
                raise EngineError("it breaks here")

        server.aggregator.finish = finish

    broken = run_threads(plans[1], keep="messages", changes={3: breaks})
    assert str(raised(broken)) == "it breaks here"
    again = run_threads(plans[1], 1, keep="messages")
    finished(again)
    one, other = keys_of(broken), keys_of(again)
    assert one.keys() == other.keys() == {0, 1, 2}
    pieces = [key[at : at + 32] for found in (one, other) for key in found.values() for at in (0, 32, 64)]
    assert len(set(pieces)) == len(pieces)
    whole, made = map(made_by, plans)
    assert all(np.array_equal(whole[name], made[name]) for name in whole)
    for folder in plans[1].folders[:-1]:
        lines = [json.loads(line) for line in (folder / REVEALED).read_text().splitlines()]
        assert lines == [[0, [0, 1, 2]], [1, [0, 1, 2]]]


def test_what_was_revealed_of_a_round_is_not_revealed_with_another_group(tmp_path: Path) -> None:
    path = tmp_path / "of a rank" / REVEALED
    for number, stayed in ((0, [2, 0, 1]), (1, [0, 1]), (0, [0, 1, 2]), (1, [1, 0])):
        keep_revealed(path, number, stayed)
    with pytest.raises(PolicyViolation, match="round 1"):
        keep_revealed(path, 1, [0, 1, 2])
    assert path.read_text() == "[0, [0, 1, 2]]\n[1, [0, 1]]\n"


def test_a_line_that_was_cut_off_was_never_revealed(tmp_path: Path) -> None:
    path = tmp_path / REVEALED
    path.write_text("[0, [0, 1, 2]]\n[1, [0, 1")
    keep_revealed(path, 1, [0, 1, 2])
    assert path.read_text() == "[0, [0, 1, 2]]\n[1, [0, 1, 2]]\n"


# --- jobs that cannot be masked -------------------------------------------------------------------


def checked(method: str, count: int = 5, **table: Any) -> Mapping[str, Any]:
    clients = [{"node": f"client{i}", "data": "rows"} for i in range(count)]
    return TRAINING.check(
        {"method": method, "clients": clients, "server": {"node": "server"}, "masked": True} | table
    )


@pytest.mark.parametrize("method", sorted(AGGREGATORS))
def test_a_method_is_masked_if_it_is_a_sum_and_refused_by_name_if_not(method: str) -> None:
    if method in SUMS:
        assert checked(method)["masked"] is True
        return
    with pytest.raises(ConfigError) as refused:
        checked(method)
    assert f"; {method} does" in str(refused.value)
    assert all(name in str(refused.value) for name in SUMS)


def test_what_is_no_sum_is_known_to_be_none() -> None:
    none = {"flora", "flexlora", "median", "trimmed-mean", "krum", "flasc", "lora-a2", "scaffold", "mira"}
    assert not none & SUMS
    assert {"fedavg", "ffa", "fedprox", "fedavgm", "fedkseed", "mezo"} <= SUMS


@pytest.mark.parametrize(
    ("method", "table", "said"),
    [
        ("fedavg", {"count": 2}, "at least 3 clients"),
        ("fedkseed", {"seed_sampling": "amplitude"}, "seed_sampling = uniform"),
        ("fedavg", {"mask_clip": 0.0}, "mask_clip above 0"),
        ("fedavg", {"mask_clip": 1e7}, "mask_clip above 0, up to 1e6"),
        ("fedavg", {"masked": "yes"}, "true or false"),
    ],
)
def test_a_masked_job_that_cannot_be_is_refused_before_it_starts(
    method: str, table: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(method, **table)
