"""A federated job's file: what is wrong in it is named before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from edged_plugins import personal_lora, zeroth_order

from edged import ConfigError

AGGREGATORS = {
    entry.name: entry for entry in (*personal_lora.edged_aggregators({}), *zeroth_order.edged_aggregators({}))
}
TRAINING = personal_lora.edged_trainings(AGGREGATORS)[0]
TWO = [{"node": "a", "data": "rows"}, {"node": "b", "data": "rows"}]
SEEDS = {"node": "c", "data": "rows", "method": "fedkseed"}
GOOD = {"method": "fedavg", "clients": TWO, "server": {"node": "s"}}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "clients that are a number": ({"clients": 5}, r"\[\[clients\]\] as tables"),
    "options that are a list": ({"options": ["a"]}, "options as a table"),
    "a method that is a list": ({"method": ["fedavg"]}, "method as text"),
    "a client's method that is a list": (
        {"clients": [TWO[0] | {"method": ["x"]}]},
        "text for clients.method",
    ),
    "steps": ({"steps": 100}, "no key 'steps' in a training job"),
    "a key of another method": ({"mu": 0.1}, "no key 'mu'"),
    "a bound that is passed": ({"method": "fedprox", "mu": float("nan")}, "mu: expected a number"),
    "a graph that is none": ({"method": "mira", "graph": "star"}, "graph: expected complete or ring"),
    "no seeds": ({"method": "fedkseed", "seeds": 0}, "seeds: expected 1 to 65536, got 0"),
    "many seeds": ({"method": "fedkseed", "seeds": 1 << 40}, "seeds: expected 1 to 65536"),
    "no perturbation": ({"method": "mezo", "perturbation": 0.0}, "perturbation: expected"),
    "another sampling": ({"method": "fedkseed", "seed_sampling": "greedy"}, "seed_sampling: expected"),
    "one coordinate": ({"method": "ferret", "coordinates": 1}, "coordinates: expected 2 to 65536, got 1"),
    "no step at all": ({"method": "ferret", "server_learning_rate": 0.0}, "server_learning_rate: expected"),
    "no candidate": ({"method": "fwdllm", "candidates": 0}, "candidates: expected 1 to 1000, got 0"),
    "a variance that is none": (
        {"method": "fwdllm", "variance_most": float("nan")},
        "variance_most: expected",
    ),
    "masked slopes": ({"method": "fwdllm", "masked": True}, "needs no more than the sum of updates"),
    "masked projections": ({"method": "ferret", "masked": True}, "needs no more than the sum of updates"),
    "seeds among projections": ({"method": "ferret", "clients": [*TWO, SEEDS]}, "no client with another"),
    "slopes at unlike rates": (
        {"method": "fwdllm", "clients": [TWO[0] | {"learning_rate": 0.1}, TWO[1]]},
        "one learning_rate for all clients with fwdllm",
    ),
    "a density of nothing": ({"method": "flasc", "upload_density": 0.0}, "upload_density: expected"),
    "another objective": ({"objective": "ppo"}, "objective as one of sft, dpo; 'ppo' came"),
    "no beta": ({"objective": "dpo", "beta": 0.0}, "beta above 0"),
    "preferences on prompts": ({"objective": "dpo", "loss_on": "all"}, "loss_on = answer with objective"),
    "preferences on moving weights": (
        {"objective": "dpo", "method": "flora"},
        "a method other than flora with objective = dpo",
    ),
    "half a row": ({"rehearsal": 0.1}, "rehearsal x batch_size as whole rows, from 1 .* 0.1 x 4 came"),
    "nothing but rehearsal": ({"rehearsal": 1.0}, "rehearsal from 0 to below 1"),
    "a target twice": ({"target_modules": ["q_proj", "q_proj"]}, "each of target_modules once"),
    "few for krum": ({"method": "krum"}, "at least 5 clients in a round with krum; 2 came"),
    "narrow weights": ({"method": "flora", "weights": "bf16"}, "weights f32 with flora"),
    "personal on moving weights": ({"method": "flora", "personal": "ditto"}, "personal = none with flora"),
    "a rate of its own": (
        {"method": "fedkseed", "clients": [TWO[0] | {"learning_rate": 0.1}, TWO[1]]},
        "one learning_rate for all clients with fedkseed",
    ),
    "seeds among control variates": (
        {"method": "scaffold", "clients": [*TWO, SEEDS]},
        "no client with another",
    ),
    "seeds among frozen factors": ({"method": "ffa", "clients": [*TWO, SEEDS]}, "no client with another"),
    "seeds among masks": ({"masked": True, "clients": [*TWO, SEEDS]}, "every client with masked = true"),
    "a weight without end": ({"clients": [TWO[0] | {"weight": 10**30}, TWO[1]]}, "weight from 0 to 2"),
    "pushes in a masked sum": ({"method": "fedbuff", "masked": True}, "with masked = true .*; fedbuff does"),
    "pushes and a part of its own": ({"method": "fedbuff", "personal": "ditto"}, "personal = none with fed"),
    "a draw of those that nobody waits for": (
        {"method": "delayed-nesterov", "fraction": 0.5},
        "fraction = 1 with delayed-nesterov",
    ),
    "seeds among pushes": (
        {"method": "fedbuff", "clients": [*TWO, SEEDS]},
        "the job's method of every client with fedbuff",
    ),
    "pushes of one client": (
        {"clients": [TWO[0], TWO[1] | {"method": "fedbuff"}]},
        "clients with the job's method, or one of fedkseed",
    ),
    "a weight where all pushes count alike": (
        {"method": "delayed-nesterov", "weight_most": 9},
        "no weight with delayed-nesterov",
    ),
    "momentum that is spread too far": (
        {"method": "delayed-nesterov", "window": 4, "spread": 0.3},
        "spread from 0 to 1 / window, here 1 / 4",
    ),
    "an empty buffer": ({"method": "fedbuff", "buffer": 0}, "buffer: expected a number 1 or more"),
    "a method that cannot join": ({"clients": [TWO[0], TWO[1] | {"method": "mira"}]}, "or one of fedkseed"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TRAINING.check(GOOD | changes)


def test_members_that_take_gradients_may_have_rates_of_their_own() -> None:
    clients = [TWO[0] | {"learning_rate": 0.1}, TWO[1]]
    assert (
        TRAINING.check(GOOD | {"method": "ferret", "clients": clients})["clients"][0]["learning_rate"] == 0.1
    )


@pytest.mark.parametrize("method", sorted(AGGREGATORS))
def test_settings_that_were_read_are_read_alike_again(method: str) -> None:
    clients = [{"node": name, "data": "rows"} for name in "abcde"]
    once = TRAINING.check(GOOD | {"method": method, "clients": clients, "rounds": 7})
    assert once["steps"] == 7
    assert TRAINING.check(once) == once


def test_every_key_is_explained() -> None:
    explained = {key.key: key for key in TRAINING.keys}
    own = {key.key for entry in AGGREGATORS.values() for key in entry.keys}
    assert own <= set(explained)
    assert all(key.text for key in explained.values())
    assert "flora" in explained["method"].text
