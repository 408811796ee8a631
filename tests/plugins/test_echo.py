"""The echo plugin: the engine's contract, on one rank and on several, over an in-memory channel."""

import pkgutil
import queue
import threading
import types

import msgspec
import pytest
from edged_plugins import _echo_engine, echo

from edged import (
    Engine,
    EngineError,
    EngineSpec,
    EngineSpeed,
    ModelDescription,
    PeerError,
    Role,
    Sampling,
    Step,
)
from edged.plugins import Host

GREEDY = Sampling(temperature=0.0)
PROMPTS = ["hello", "h", "", "hellohello", "naïve 🙂", "a\0b"]


class Wires:
    """Channels of one process: a queue for each pair of ranks."""

    def __init__(self, size):
        self.queues = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.channels = [Channel(self, rank, size) for rank in range(size)]


class Channel:
    def __init__(self, wires, rank, size):
        self.wires, self.rank, self.size, self.bytes_sent = wires, rank, size, 0

    def send(self, to, header, frames=()):
        self.bytes_sent += sum(len(frame) for frame in frames)
        self.wires.queues[self.rank, to].put((dict(header), [memoryview(bytes(frame)) for frame in frames]))

    def receive(self, source, timeout_s):
        try:
            return self.wires.queues[source, self.rank].get(timeout=timeout_s)
        except queue.Empty as error:
            raise PeerError(f"rank {source} said nothing") from error

    def poll(self, source, timeout_s):
        return not self.wires.queues[source, self.rank].empty()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.echo"
    path.write_text("edged-echo 1\n")
    return msgspec.convert(_echo_engine.describe(str(path)), ModelDescription)


def run(engine, steps):
    engine.begin(steps)
    return engine.finish()


def loaded(model, channel, context=4096):
    roles = tuple(
        Role(rank, f"node{rank}", 0, (0, 6), (0, 6), (0, 96), (0, 256), 1.0) for rank in range(channel.size)
    )
    return _echo_engine.EchoEngine(EngineSpec("model.echo", model, roles, channel.rank, context), channel)


@pytest.fixture
def engine(model):
    return loaded(model, Wires(1).channels[0])


def said(engine, tokens, count=None, sequence=0):
    """What the engine says after `tokens`: to the end token, or `count` tokens whatever they are."""
    answer, position = [], 0
    while count is None or len(answer) < count:
        [token] = run(engine, [Step(sequence, tokens, position, GREEDY)])
        if count is None and token in engine.end_tokens:
            break
        position, tokens = position + len(tokens), [token]
        answer.append(token)
    return answer


def test_every_dotted_name_of_the_entry_resolves():
    [entry] = echo.edged_engines(settings={})
    for name in (entry.load, entry.describe, entry.measure, entry.check):
        assert callable(pkgutil.resolve_name(name))


def test_the_plugin_module_itself_does_not_hold_the_engine():
    assert not [value for value in vars(echo).values() if isinstance(value, types.ModuleType)]


def test_ended_jobs_are_counted_by_state():
    before = echo.finished["done"]
    echo.edged_job_finished(state="done")
    assert echo.finished["done"] == before + 1


def test_an_engine_fulfils_the_protocol(engine):
    assert isinstance(engine, Engine)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_said_back_to_its_end(engine, prompt):
    answer = said(engine, engine.encode(prompt, raw=True))
    assert engine.decode(answer) == prompt.replace("\0", "").encode()


def test_a_conversation_is_said_back_as_its_contents(engine):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert engine.decode(said(engine, engine.encode(messages, raw=False))) == b"be brief\nhi"


def test_the_echo_comes_again_when_the_end_is_ignored(engine):
    assert said(engine, engine.encode("ab", raw=True), 7) == [*b"ab", 0, *b"ab", 0, *b"a"]


def test_tokens_without_an_end_are_taken_whole_as_the_prompt(engine):
    assert said(engine, list(b"ab"), 7) == [*b"ab", 0, *b"ab", 0, *b"a"]


@pytest.mark.parametrize("cut", range(9))
def test_a_job_that_goes_on_elsewhere_says_the_same(model, cut):
    first, second = (loaded(model, Wires(1).channels[0]) for _ in range(2))
    prompt = first.encode("hello", raw=True)
    whole = said(first, prompt, 9)
    assert whole[:cut] + said(second, prompt + whole[:cut], 9 - cut) == whole


@pytest.mark.parametrize("pieces", [[5], [1, 4], [1, 1, 1, 1, 1]])
def test_a_prompt_may_come_in_pieces(engine, pieces):
    tokens, position = engine.encode("hell", raw=True), 0
    assert len(tokens) == sum(pieces)
    for size in pieces[:-1]:
        assert run(engine, [Step(0, tokens[position : position + size], position, None)]) == [None]
        position += size
    assert run(engine, [Step(0, tokens[position:], position, GREEDY)]) == [ord("h")]


def test_sequences_of_one_batch_do_not_mix(engine):
    prompts = [engine.encode(text, raw=True) for text in ("one", "two")]
    steps = [Step(number, prompt, 0, GREEDY) for number, prompt in enumerate(prompts)]
    assert run(engine, steps) == [ord("o"), ord("t")]
    steps = [Step(0, [ord("o")], 4, GREEDY), Step(1, [ord("t")], 4, GREEDY)]
    assert run(engine, steps) == [ord("n"), ord("w")]


def test_a_released_sequence_begins_anew(engine):
    said(engine, engine.encode("one", raw=True))
    engine.release(0)
    engine.release(0)
    assert engine.decode(said(engine, engine.encode("two", raw=True))) == b"two"


def test_a_sequence_may_keep_the_beginning_of_its_prompt(engine):
    said(engine, engine.encode("one two", raw=True))
    assert run(engine, [Step(0, engine.encode("three", raw=True), 4, GREEDY)]) == [ord("o")]
    assert run(engine, [Step(0, [ord("o")], 10, GREEDY)]) == [ord("n")]


@pytest.mark.parametrize(
    ("tokens", "position", "expected"),
    [([1], 3, "position 0 to 2"), ([1], -1, "position 0 to 2"), ([1] * 5000, 0, "at most 4096 tokens")],
    ids=["behind a gap", "before the start", "more than the context"],
)
def test_a_step_that_does_not_fit_is_refused(engine, tokens, position, expected):
    run(engine, [Step(0, [1, 2], 0, GREEDY)])
    with pytest.raises(EngineError, match=expected):
        run(engine, [Step(0, tokens, position, GREEDY)])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_followers_hear_every_step_and_change_nothing(model, size):
    wires = Wires(size)
    leader, *followers = (loaded(model, channel) for channel in wires.channels)
    steps = len("hello") + 1
    threads = [
        threading.Thread(target=lambda each=each: [each.follow(10.0) for _ in range(steps)])
        for each in followers
    ]
    for thread in threads:
        thread.start()
    assert leader.decode(said(leader, leader.encode("hello", raw=True))) == b"hello"
    for thread in threads:
        thread.join()
    sent = len("hello") + steps  # the prompt with its end token, then one token a step
    assert [channel.bytes_sent for channel in wires.channels] == [sent * (size - 1)] + [sent] * (size - 1)


def test_a_follower_that_answers_something_else_is_named(model):
    wires = Wires(2)
    wires.channels[1].send(0, {}, [b"nonsense"])
    leader = loaded(model, wires.channels[0])
    with pytest.raises(EngineError, match="rank 1"):
        run(leader, [Step(0, [104], 0, GREEDY)])


def test_a_follower_that_is_left_alone_says_who_is_missing(model):
    with pytest.raises(PeerError, match="rank 0"):
        loaded(model, Wires(2).channels[1]).follow(0.01)


def test_the_description_can_be_cut_anywhere(model):
    assert (model.architecture, model.layers, model.heads, model.ffn, model.vocab) == ("echo", 6, 6, 96, 256)
    assert (model.head_unit, model.ffn_unit, model.vocab_unit) == (1, 1, 1)
    assert len(model.layer_bytes) == model.layers
    assert sum(model.layer_bytes) + model.embedding_bytes + model.head_bytes == model.parameters


@pytest.mark.parametrize("content", ["", "GGUF", "edged-echo 2\n", "edged-echo 1 and more\n", "\n"])
def test_another_file_is_not_an_echo_model(tmp_path, content):
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(EngineError, match="edged-echo 1"):
        _echo_engine.describe(str(path))


def test_a_measurement_is_of_the_model_s_weight_type(model):
    [speed] = [msgspec.convert(speed, EngineSpeed) for speed in _echo_engine.measure({})]
    assert (speed.name, speed.weight_type) == ("echo", model.weight_type)
    assert speed.decode_bytes_s > 0
    assert speed.prefill_flops_s > 0


def test_the_check_answers_with_its_version():
    assert _echo_engine.check({}) == {"version": "1", "max_error": 0.0}


def test_the_host_loads_every_small_plugin_by_name_and_finds_what_it_brings():
    host = Host()
    host.load(["echo", "static", "mdns", "monitor", "layer_parallel", "tensor_parallel"], {})
    assert list(host.registrations("edged_engines")) == ["echo"]
    assert sorted(host.registrations("edged_discoverers")) == ["mdns", "static"]
    assert sorted(host.registrations("edged_strategies")) == ["hybrid", "layers", "tensor"]
    assert len(host.registrations("edged_sensors")) == 7
    before = echo.finished["failed"]
    host.observe("edged_job_finished", job_id="j1", state="failed", measured={})
    assert echo.finished["failed"] == before + 1
