"""The engine `cloud` against real HTTP servers, well-behaved and not."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import queue
import random
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import endpoint as endpoints
import pytest
from endpoint import KEY, Answer, Endpoint, key_file, saying, serving

if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf", "numpy")):
    pytest.skip("llama-cpp-python is not installed (pip install edged[llama])", allow_module_level=True)

import msgspec
from edged_plugins import cloud
from edged_plugins._cloud_engine import CloudEngine, load, ranges
from edged_plugins._cloud_settings import address_of, read_key
from edged_plugins._cloud_stream import LINE_BYTES_MAX, End, Stream
from edged_plugins._llama_describe import describe
from edged_plugins._settling import HELD_CHARS_MAX, Settling
from edged_plugins._tokenizer import Tokenizer
from edged_plugins.shard import _check

from edged import ConfigError, EdgedError, EngineError, EngineSpec, ModelDescription, Role, Sampling, Step

SECRET = "the prompt that nobody else may see"
GREEDY = Sampling(temperature=0, top_p=1.0, seed=7)


# --- settings -------------------------------------------------------------------------------------


def test_it_is_off_until_the_profile_names_an_endpoint() -> None:
    assert cloud.edged_engines({}) == []


def test_an_engine_says_what_the_profile_says(tmp_path: Path) -> None:
    chosen = endpoints.settings("https://api.example.org/v1/", key_file(tmp_path), joules_per_token=3)
    [entry] = cloud.edged_engines(chosen)
    assert (entry.models, entry.strategies, entry.numerics) == (("smol",), ("cloud",), ("fast",))
    assert entry.stated is not None
    assert (entry.stated.ttft_ms, entry.stated.tpot_ms, entry.stated.joules_per_token) == (50.0, 2.0, 3)
    assert entry.stated.joules_source == "estimated"
    assert KEY not in repr(entry)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"endpoit": "x"}, "no setting plugin.cloud.endpoit; known: endpoint, models"),
        ({"endpoint": "http://api.example.org/v1"}, "by https; http to api.example.org"),
        ({"endpoint": "ftp://api.example.org"}, 'like "https://api.example.org/v1"'),
        ({"endpoint": f"https://me:{KEY}@api.example.org"}, "without user, password"),
        ({"endpoint": f"https://api.example.org/v1?key={KEY}"}, "the key goes into key_file"),
        ({"endpoint": "https://api.example.org:99999/v1"}, "a valid host and port"),
        ({"endpoint": "https://api.example.org/v1\r\nX: y"}, "printable ASCII"),
        ({"endpoint": 7}, "printable ASCII"),
        ({"models": {}}, "expected plugin.cloud.models"),
        ({"models": {"smol": 7}}, "expected plugin.cloud.models"),
        ({"models": {"smol": ""}}, "expected plugin.cloud.models"),
        ({"ttft": 700}, "expected a duration"),
        ({"tpot": "0ms"}, "expected plugin.cloud.tpot above 0"),
        ({"timeout": "10m"}, "above 0 and at most 100s"),
        ({"joules_per_token": -1.0}, "joules_per_token of 0 or more"),
        ({"joules_per_token": float("inf")}, "joules_per_token of 0 or more"),
        ({"key_file": "cloud.key"}, "an absolute path"),
        ({"key_file": "/nowhere/cloud.key"}, "No such file"),
        ({"key_file": "/dev/null"}, "a file of this user that nobody else may read"),
    ],
)
def test_a_wrong_setting_is_refused_and_no_secret_repeated(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cloud.edged_engines(endpoints.settings("https://api.example.org/v1") | change)
    assert says in str(caught.value)
    assert caught.value.remedy
    assert KEY not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("missing", ["endpoint", "models", "ttft", "tpot"])
def test_what_cannot_be_guessed_must_be_there(missing: str) -> None:
    chosen = endpoints.settings("https://api.example.org/v1")
    del chosen[missing]
    with pytest.raises(ConfigError, match=f"plugin.cloud.{missing}"):
        cloud.edged_engines(chosen)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="nobody else may read"):
        cloud.edged_engines(endpoints.settings("https://a.example", key_file(tmp_path, mode)))


@pytest.mark.parametrize("key", ["", "two keys", "a\r\nb", "schlüssel", "k" * 5000])
def test_what_is_no_key_is_refused_without_a_byte_of_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key(str(key_file(tmp_path, key=key)))
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8"])
def test_on_loopback_http_will_do(host: str) -> None:
    assert not address_of(f"http://{host}:8080/v1").is_tls


# --- one answer -----------------------------------------------------------------------------------


def heard(address: str, timeout_s: float = 20.0, tokens: int = 8) -> list[Any]:
    """All that a stream puts into its queue."""
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = {"model": "SMOL", "prompt": SECRET, "max_tokens": tokens}
    stream = Stream(address_of(address), KEY, request, news, timeout_s)
    found = []
    try:
        while not found or isinstance(found[-1], str):
            found.append(news.get(timeout=30)[1])
    finally:
        stream.close()
    return found


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n', ["a", End("stop")]),
        (b': ping\r\nevent: x\r\ndata:{"choices":[{"text":"a"}]}\r\n\r\ndata: [DONE]\r\n\r\n', ["a"]),
        (b'data: {"choices":\ndata: [{"text":"a","finish_reason":"length"}]}\n\n', ["a", End("length")]),
        (b'data: {"choices":[]}\n\ndata: {"choices":[{"finish_reason":"stop"}]}\n\n', [End("stop")]),
        (b'data: {"choices":[{"text":"\\ud83d"}]}\n\ndata: [DONE]\n\n', ["�"]),
    ],
)
def test_an_answer_is_read_as_the_standard_has_it(raw: bytes, expected: list[Any]) -> None:
    def script(answer: Answer) -> None:
        answer.head()
        answer.raw(raw)

    with serving(script) as endpoint:
        assert heard(endpoint.address)[: len(expected)] == expected
    [(path, headers, body)] = endpoint.requests
    assert (path, headers["Authorization"]) == ("/v1/completions", f"Bearer {KEY}")
    assert body == {"model": "SMOL", "prompt": SECRET, "max_tokens": 8, "stream": True}


def test_an_answer_in_chunks_is_read_as_one() -> None:
    def script(answer: Answer) -> None:
        answer.head(**{"Transfer-Encoding": "chunked"})
        for piece in (b'data: {"choices":[{"te', b'xt":"a"}]}\n\ndata: [DO', b"NE]\n\n"):
            answer.raw(b"%x\r\n%s\r\n" % (len(piece), piece))
        answer.raw(b"0\r\n\r\n")

    with serving(script) as endpoint:
        endpoint.script = script
        assert heard(endpoint.address) == ["a", End("stop")]


def status(code: int, **headers: str) -> endpoints.Script:
    """A refusal that repeats all that it was told."""

    def script(answer: Answer) -> None:
        answer.head(code, "application/json", **headers)
        answer.raw(f'{{"error": "{KEY} {SECRET}"}}'.encode())

    return script


def body(raw: bytes, media: str = "text/event-stream", **headers: str) -> endpoints.Script:
    def script(answer: Answer) -> None:
        answer.head(200, media, **headers)
        answer.raw(raw)

    return script


def event(fields: str) -> bytes:
    return f'data: {{"choices":[{fields}],"said":"{KEY} {SECRET}"}}\n\n'.encode()


def many(answer: Answer) -> None:
    answer.head()
    for _ in range(40):
        answer.text("x" * 50_000)


def stalling(answer: Answer) -> None:
    answer.head()
    answer.text("a ")
    answer.stall()


def not_http(answer: Answer) -> None:
    answer.raw(f"{KEY} {SECRET}\r\n".encode())


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (status(302, Location="http://127.0.0.1:1/"), "a redirect (302), and the key goes to nobody else"),
        (status(308, Location="/v2/completions"), "a redirect (308)"),
        (status(401), "does not know the key (HTTP 401); check plugin.cloud.key_file"),
        (status(404), "no /completions, or no such model (HTTP 404)"),
        (status(429), "enough for now (HTTP 429); try again later"),
        (status(500), "it could not (HTTP 500)"),
        (status(204), "it could not (HTTP 204)"),
        (body(b"{}", "application/json"), "expected an answer of type text/event-stream; application/json"),
        (body(b"{}", KEY), "text/event-stream; something else came"),
        (body(b""), "hung up before the answer was over"),
        (body(event('{"text":"a"}')), "hung up before the answer was over"),
        (body(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}'), "hung up before"),
        (body(b"5\r\ndata:", **{"Transfer-Encoding": "chunked"}), "gave no whole answer"),
        (body(b"zz\r\n", **{"Transfer-Encoding": "chunked"}), "gave no whole answer"),
        (body(b"data: " + b"x" * LINE_BYTES_MAX + b"\n\n"), "lines of at most"),
        (body(b"data: xxxxxxxxx\n" * (LINE_BYTES_MAX // 8)), "events of at most"),
        (many, "an answer of at most"),
        (body(b"data: garbage\n\n"), "expected events of JSON"),
        (body(b"data: \xff\xfe\xff\n\n"), "expected events of JSON"),
        (body(b"data: " + b"[" * 100_000 + b"\n\n"), "expected events of JSON"),
        (body(b"data: 7\n\n"), "expected events with choices"),
        (body(b'data: {"choices":[7]}\n\n'), "expected events with choices"),
        (body(b'data: {"error":{"message":"%b"}}\n\n' % KEY.encode()), "reports an error amid its answer"),
        (body(event('{"delta":{"content":"a"}}')), "choices with text, as of /completions"),
        (body(event('{"text":7}')), "choices with text"),
        (body(event('{"text":"","finish_reason":"content_filter"}')), "another reason than stop or length"),
        (body(event('{"text":"","finish_reason":{}}')), "another reason"),
        (stalling, "nothing came in time"),
        (not_http, "does not speak HTTP as expected (BadStatusLine)"),
    ],
)
def test_a_hostile_answer_is_an_error_that_repeats_nothing_of_it(script: endpoints.Script, says: str) -> None:
    with serving(script) as endpoint:
        *_, error = heard(endpoint.address, timeout_s=0.3 if script is stalling else 20.0)
    assert isinstance(error, EngineError)
    assert says in str(error)
    assert KEY not in str(error)
    assert SECRET not in str(error)
    assert len(endpoint.requests) == 1


def test_where_nobody_listens_the_reason_is_the_systems() -> None:
    with serving(saying("a")) as endpoint:
        pass
    [error] = heard(endpoint.address)
    assert "Connection refused" in str(error)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "endpoint")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + made.public_bytes(encoding))
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
def test_over_tls_only_a_trusted_certificate_gets_the_key(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, is_trusted: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(saying("a"), lambda sock: context.wrap_socket(sock, server_side=True)) as endpoint:
        found = heard(endpoint.address)
    if is_trusted:
        assert found == ["a", End("stop")]
    else:
        assert "its certificate is not trusted" in str(found[0])
        assert not endpoint.requests


# --- text to tokens -------------------------------------------------------------------------------

TEXTS = (
    "Hello  world, it's\n\n    code(x) .\n 12345 \t\n  end",
    " It begins with a space, and ends with two.  ",
    "\n\nIt begins with lines",
    "没有空格的一段很长的文字。" * 12,
    "👩‍👩‍👧" * 20 + " a",
    " " * 300 + "x" * 300,
    "<|im_end|> is no end here",
)


@pytest.fixture(scope="module")
def vocabulary(smol: Path) -> Iterator[Tokenizer]:
    made = Tokenizer(str(smol))
    yield made
    made.close()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(3))
def test_text_in_pieces_becomes_the_tokens_of_the_whole(vocabulary: Tokenizer, text: str, seed: int) -> None:
    chance, settling = random.Random(seed), Settling(vocabulary)
    found: list[int] = []
    rest = text
    while rest:
        size = chance.randint(1, 9)
        found += settling.add(rest[:size])
        rest = rest[size:]
    found += settling.rest()
    assert vocabulary.decode(found) == text.encode()
    if "  " * 50 not in text:  # a run longer than what is held back may be cut otherwise
        assert found == vocabulary.spell(text)
    assert not set(found) & vocabulary.end_tokens


def test_a_long_word_does_not_wait_for_its_end(vocabulary: Tokenizer) -> None:
    assert Settling(vocabulary).add("文" * 2 * HELD_CHARS_MAX)


@pytest.mark.parametrize(
    "prompt", ["Why is the sky blue?", " a , b ", [{"role": "system", "content": "No."}], ""]
)
def test_the_endpoint_reads_the_tokens_that_were_meant(vocabulary: Tokenizer, prompt: Any) -> None:
    tokens = vocabulary.encode(prompt, raw=False)
    assert vocabulary.encode(vocabulary.text_of(tokens), raw=True) == tokens


class Spaced:
    """A vocabulary that, as SentencePiece does, puts a space before a text; letters are tokens."""

    def spell(self, text: str) -> list[int]:
        return list(f" {text}".encode()) if text else []

    def decode(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)


@pytest.mark.parametrize("text", ["Hello there", "\nline", " space"])
def test_a_space_that_a_vocabulary_adds_is_not_said(text: str) -> None:
    settling = Settling(Spaced())
    assert bytes(settling.add(text) + settling.rest()) == text.encode()


# --- the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(smol: Path) -> ModelDescription:
    return msgspec.convert(describe(str(smol)), ModelDescription)


@pytest.fixture
def engine_of(smol: Path, model: ModelDescription, tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def made(address: str, **fields: Any) -> Iterator[CloudEngine]:
        chosen = endpoints.settings(address, key_file(tmp_path), **fields.pop("settings", {}))
        engine = load(spec_of(smol, model, chosen, **fields), _check.Alone())
        try:
            yield engine
        finally:
            engine.close()

    return made


def spec_of(path: Path, model: ModelDescription, chosen: Any, **fields: Any) -> EngineSpec:
    roles = (Role(0, "n", 0, (0, 0), (0, 0), (0, 0), (0, 0), share=1.0),) * fields.pop("ranks", 1)
    known = {"settings": chosen, "model_name": "smol"}
    return EngineSpec(str(path), model, roles, 0, 256, **(known | fields))


def step(engine: CloudEngine, *steps: Step) -> list[int | None]:
    engine.begin(steps)
    return engine.finish()


def generate(
    engine: CloudEngine, prompt: Sequence[int], count: int, sequence: int = 1, ignore_end: bool = False
) -> list[int]:
    """Tokens after the prompt, as the worker asks for them: to the end token or `count`."""
    engine.open(sequence, prompt, len(prompt) + count)
    pending, position, made = tuple(prompt), 0, list[int]()
    while len(made) < count:
        [token] = step(engine, Step(sequence, pending, position, GREEDY))
        position += len(pending)
        pending = () if token is None else (token,)
        made += pending
        if token in engine.end_tokens and not ignore_end:
            break
    engine.release(sequence)
    return made


def test_a_sequence_is_one_request_and_its_text_the_models_tokens(engine_of: Callable[..., Any]) -> None:
    with serving(saying("The sky", " is", " bl", "ue.")) as endpoint, engine_of(endpoint.address) as engine:
        prompt = engine.encode("Why is the sky blue?", raw=False)
        found = generate(engine, prompt, 30)
        assert engine.decode(found) == b"The sky is blue."
        assert found[-1] in engine.end_tokens
        assert engine.bytes_sent > len(endpoint.bodies[0]["prompt"])
    [asked] = endpoint.bodies
    assert asked.pop("prompt").endswith("user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")
    assert asked == {
        **{"model": "SMOL", "stream": True, "max_tokens": 30},
        **{"temperature": 0, "top_p": 1.0, "seed": 7},
    }


def test_what_a_job_had_made_elsewhere_is_said_to_the_endpoint(engine_of: Callable[..., Any]) -> None:
    with serving(saying(" four five")) as endpoint, engine_of(endpoint.address) as engine:
        history = engine.encode("one two", raw=True)
        assert engine.decode(generate(engine, history, 9)) == b" four five"
    assert endpoint.bodies[0]["prompt"] == "one two"


def test_an_endpoint_that_stops_short_is_asked_to_go_on(engine_of: Callable[..., Any]) -> None:
    def script(answer: Answer) -> None:
        first = answer.body["prompt"] == "one"
        saying(" two" if first else " three", reason="length" if first else "stop")(answer)

    with serving(script) as endpoint, engine_of(endpoint.address) as engine:
        assert engine.decode(generate(engine, engine.encode("one", raw=True), 9)) == b" two three"
    assert [asked["prompt"] for asked in endpoint.bodies] == ["one", "one two"]
    assert endpoint.bodies[1]["max_tokens"] < endpoint.bodies[0]["max_tokens"]


def test_an_endpoint_that_never_says_a_word_is_not_asked_for_ever(engine_of: Callable[..., Any]) -> None:
    with serving(saying(reason="length")) as endpoint, engine_of(endpoint.address) as engine:
        with pytest.raises(EngineError, match="before the first word"):
            generate(engine, engine.encode("one", raw=True), 9)
        assert len(endpoint.requests) == 1


def test_after_its_end_nothing_more_can_be_had(engine_of: Callable[..., Any]) -> None:
    with serving(saying(" two")) as endpoint, engine_of(endpoint.address) as engine:
        prompt = engine.encode("one", raw=True)
        assert engine.decode(generate(engine, prompt, 9)) == b" two"
        with pytest.raises(EngineError, match="drop --ignore-eos"):
            generate(engine, prompt, 9, ignore_end=True)


def test_a_slow_sequence_holds_up_no_other_and_is_given_up_in_time(engine_of: Callable[..., Any]) -> None:
    def script(answer: Answer) -> None:
        if answer.body["prompt"] == "slow":
            answer.head()
            answer.raw(b": not yet\n\n")
            answer.stall()
        else:
            saying(" and on", " and on.")(answer)

    with serving(script) as endpoint, engine_of(endpoint.address, settings={"timeout": "3s"}) as engine:
        slow = engine.encode("slow", raw=True)
        engine.open(1, slow, 20)
        assert step(engine, Step(1, slow, 0, GREEDY)) == [None]
        assert engine.decode(generate(engine, engine.encode("fast", raw=True), 20, 2)) == b" and on and on."
        with pytest.raises(EngineError, match=r"a word of the endpoint within 3 s|nothing came in time"):
            generate(engine, slow, 20)


def test_what_came_before_a_break_is_given_first(engine_of: Callable[..., Any]) -> None:
    cut = body(b'data: {"choices":[{"text":" two three four"}]}\n\n')
    with serving(cut) as endpoint, engine_of(endpoint.address) as engine:
        prompt = engine.encode("one", raw=True)
        assert engine.decode(generate(engine, prompt, 2)) == b" two three"
        with pytest.raises(EngineError, match="hung up"):
            generate(engine, prompt, 9)


def test_releasing_a_sequence_hangs_up(engine_of: Callable[..., Any]) -> None:
    hung_up = queue.SimpleQueue[bool]()

    def script(answer: Answer) -> None:
        answer.head()
        try:
            while not answer.over.wait(0.001):
                answer.text("on and ")
        except OSError:
            hung_up.put(True)

    with serving(script) as endpoint, engine_of(endpoint.address) as engine:
        generate(engine, engine.encode("one", raw=True), 3)
        assert hung_up.get(timeout=30)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"numerics": "exact"}, "nobody can check the numerics"),
        ({"ranks": 2}, "a plan of 2 roles came"),
        ({"model_name": "other"}, "no model of the endpoint for 'other'"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused_on_loading(
    engine_of: Callable[..., Any], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(EdgedError, match=says), engine_of("https://api.example.org", **fields):
        pass


def test_the_head_of_the_file_is_all_it_reads(smol: Path, model: ModelDescription, tmp_path: Path) -> None:
    chosen = endpoints.settings("https://api.example.org")
    [(start, stop)] = ranges(spec_of(smol, model, chosen))
    part = tmp_path / "part.gguf"
    with smol.open("rb") as whole, part.open("wb") as file:
        file.write(whole.read(stop))
        file.truncate(smol.stat().st_size)
    assert (start, stop < smol.stat().st_size // 10) == (0, True)
    engine = load(spec_of(part, model, chosen), _check.Alone())
    assert engine.decode(engine.encode("one two", raw=True)) == b"one two"
    engine.close()


def test_an_endpoint_is_never_asked_before_a_job_is_there(engine_of: Callable[..., Any]) -> None:
    with serving(saying("a")) as endpoint, engine_of(endpoint.address):
        pass
    assert isinstance(endpoint, Endpoint)
    assert not endpoint.requests
