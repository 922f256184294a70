"""A server as its clients see it: the answers of the model, whoever else asks."""

import concurrent.futures
import json
import signal
import threading
import time

import httpx2 as httpx
import openai
import pytest

from ten_dist.cli import main
from ten_dist.generation import Sampling, generate
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel, tokenizer_of
from tests.serving.conftest import served

GREEDY = {"model": "tiny", "temperature": 0}
PROMPTS = ["a", "the state", "of every eigenvalue that decays", "", "wave " * 30]


@pytest.fixture(scope="module")
def alone(run_folder):
    """What the model continues a prompt with, greedily and by itself."""
    network = TrainedModel.load(RunFolder(run_folder)).network
    tokenizer = tokenizer_of(RunFolder(run_folder))
    separator = tokenizer.separator_id

    def continued(prompt, tokens):
        ids = tokenizer.encode([prompt])[0].tolist() or [separator]
        (added,) = generate(
            network, [ids], tokens, Sampling(temperature=0), [separator]
        )
        return tokenizer.decode([i for i in added if i != separator])

    return continued


def in_threads(function, items):
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.01)


def test_streams_at_once_are_what_each_alone_would_be(server, alone):
    client = server.client()

    def ask(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        stream = client.completions.create(
            **GREEDY, prompt=prompt, max_tokens=10 + number, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    # More than there are slots.
    answers = in_threads(ask, range(24))
    for number, answer in enumerate(answers):
        assert answer == alone(PROMPTS[number % len(PROMPTS)], 10 + number)


def test_a_completion_says_what_it_took(server, alone):
    answer = server.client().completions.create(
        **GREEDY, prompt=["abc", "defgh"], max_tokens=7, n=2, logprobs=3
    )
    texts = [choice.text for choice in answer.choices]
    assert texts == [alone(p, 7) for p in ("abc", "abc", "defgh", "defgh")]
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == 28
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        table = choice.logprobs
        for token, logprob, best in zip(
            table.tokens, table.token_logprobs, table.top_logprobs, strict=True
        ):
            # Greedy: the likeliest, among three.
            assert (
                best[token]
                == pytest.approx(logprob)
                == pytest.approx(max(best.values()))
            )
            assert len(best) == 3


def test_prompts_of_token_ids_are_those_of_their_text(server, alone):
    ids = list(b"token")
    answer = server.client().completions.create(**GREEDY, prompt=ids, max_tokens=5)
    assert answer.choices[0].text == alone("token", 5)


def test_a_stop_text_ends_an_answer_before_it(server, alone):
    whole = alone("the state", 40)
    stop = whole[5:8]
    options = {**GREEDY, "prompt": "the state", "max_tokens": 40, "stop": ["☃", stop]}
    answer = server.client().completions.create(**options)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


def test_a_seed_repeats_and_settings_reach_the_model(server):
    client = server.client()

    def drawn(**options):
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 30, **options}
        extra = {k: asked.pop(k) for k in ("top_k", "min_p") if k in asked}
        return client.completions.create(**asked, extra_body=extra).choices[0].text

    assert drawn(seed=5) == drawn(seed=5) != drawn(seed=6)
    greedy = drawn(temperature=0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert drawn(seed=5, **narrow) == greedy
    assert drawn(temperature=0, frequency_penalty=2.0) != greedy


def test_a_conversation_is_answered(server):
    client = server.client()
    asked = {
        **GREEDY,
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_completion_tokens": 12,
    }
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert whole.usage.completion_tokens <= 12
    entries = whole.choices[0].logprobs.content
    assert bytes(b for e in entries for b in e.bytes).decode() == message.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(said) == message.content


def test_what_prompts_have_in_common_is_read_once(server, alone):
    client = server.client()
    before = server.metric("ten_cache_saved_tokens_total")
    prompt = "a long beginning that two prompts have in common, and "
    first = client.completions.create(**GREEDY, prompt=prompt, max_tokens=5)
    more = prompt + first.choices[0].text + "x"
    second = client.completions.create(**GREEDY, prompt=more, max_tokens=9)
    assert server.metric("ten_cache_saved_tokens_total") >= before + len(prompt)
    assert second.choices[0].text == alone(more, 9)


def test_models_are_listed(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("large")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_times_of_tokens_are_measured(server):
    names = [f"ten_{part}_seconds" for part in ("first_token", "token", "request")]
    before = [server.metric(f"{name}_sum") for name in names]
    server.client().completions.create(**GREEDY, prompt="x", max_tokens=1000, n=2)
    after = [server.metric(f"{name}_sum") for name in names]
    first, each, whole = (b - a for a, b in zip(before, after, strict=True))
    # The first piece of an answer can have several tokens.
    assert 0.99 * (whole - first) / 1000 <= each < whole - first


def test_a_client_that_goes_away_frees_its_slot(server):
    endless = {**GREEDY, "prompt": "a", "max_tokens": 4096}
    for stream in (True, False):
        body = json.dumps({**endless, "stream": stream}).encode()
        with server.connection(body):
            wait_until(lambda: server.metric("ten_slots_used") == 1)
        closed_at = server.metric("ten_steps_total")
        wait_until(lambda: server.metric("ten_slots_used") == 0)
        # Between the two requests for the metric there were steps; far from all.
        assert server.metric("ten_steps_total") < closed_at + 1000


def test_more_than_may_wait_is_refused_and_the_rest_answered(run_folder, alone):
    with served(run_folder, "--slots", 2, "--queue", 3) as server:
        client = server.client()

        def ask(number):
            try:
                answer = client.completions.create(
                    **GREEDY, prompt="a", max_tokens=300 + number
                )
            except openai.RateLimitError as error:
                assert int(error.response.headers["Retry-After"]) >= 1
                return None
            return answer.choices[0].text

        answers = in_threads(ask, range(12))
        answered = [number for number, text in enumerate(answers) if text is not None]
        assert 5 <= len(answered) < 12
        assert all(answers[n] == alone("a", 300 + n) for n in answered)


def test_requests_that_take_too_long_are_ended(run_folder):
    with served(run_folder, "--request_timeout", 0.3) as server:
        endless = {**GREEDY, "prompt": "a", "max_tokens": 4096}
        with pytest.raises(
            openai.InternalServerError, match="longer than 0.3 s"
        ) as caught:
            server.client().completions.create(**endless)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than 0.3 s"):
            for _ in server.client().completions.create(**endless, stream=True):
                pass
        wait_until(lambda: server.metric("ten_slots_used") == 0)
        with server.connection(b"{", length=100) as slow:
            assert b" 408 " in slow.makefile("rb").readline()


def test_only_who_has_the_key_is_served(run_folder):
    with served(run_folder, environment={"TEN_DIST_API_KEY": "sesame"}) as server:
        asked = {**GREEDY, "prompt": "a", "max_tokens": 2}
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="simsim").completions.create(**asked)
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert server.client(api_key="sesame").completions.create(**asked).choices
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_signal_loses_no_request(run_folder, alone):
    with served(run_folder, "--slots", 4) as server:
        client = server.client()
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            under_way = [
                pool.submit(
                    client.completions.create, **GREEDY, prompt="a", max_tokens=400 + n
                )
                for n in range(8)
            ]
            wait_until(lambda: server.metric("ten_slots_used") == 4)
            wait_until(lambda: server.metric("ten_queue_length") == 4)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            with pytest.raises(openai.InternalServerError, match="about to end"):
                client.completions.create(**GREEDY, prompt="late", max_tokens=1)
            answers = [future.result().choices[0].text for future in under_way]
        assert answers == [alone("a", 400 + n) for n in range(8)]
        assert server.process.wait(timeout=20) == 0


def test_clients_that_send_half_a_request_keep_no_server_from_its_end(run_folder):
    with served(run_folder, "--grace_period", 0.1) as server:
        with server.connection(b"{", length=100):
            pass
        with server.connection(b"{", length=100):
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=20) == 0


def test_a_grace_period_ends_what_takes_longer(run_folder):
    with served(run_folder, "--grace_period", 0.2) as server:
        failed = []

        def ask():
            try:
                server.client().completions.create(
                    **GREEDY, prompt="a", max_tokens=4096
                )
            except openai.InternalServerError as error:
                failed.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: server.metric("ten_slots_used") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
        asking.join()
        assert "about to end" in failed[0]


def test_an_exported_model_is_served_as_its_run(run_folder, alone, tmp_path):
    pytest.importorskip("transformers")
    assert main(["export", str(run_folder), "--output", str(tmp_path / "model")]) == 0
    with served(tmp_path / "model", "--model_name", "mine") as server:
        asked = {"model": "mine", "prompt": "the state", "max_tokens": 30}
        answer = server.client().completions.create(**asked, temperature=0)
        assert answer.choices[0].text == alone("the state", 30)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint", "best"], "is of runs"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_named(run_folder, tmp_path, options, named, capsys):
    folder = run_folder
    if "--checkpoint" in options:
        folder = tmp_path
        (folder / "config.json").write_text('{"model_type": "ten"}')
    assert main(["serve", str(folder), *options]) == 2
    assert named in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
