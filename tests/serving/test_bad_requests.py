"""Requests that make no sense: each is refused in one sentence, and nobody else notices."""

import gc
import json
import socket
import threading
import time

import httpx2 as httpx
import pytest

from ten_dist.serving.protocol import BadRequest, CompletionRequest, parse

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 2,
}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def completion(**changes):
    return (COMPLETIONS, json.dumps({**COMPLETION, **changes}).encode())


def chat(**changes):
    return (CHATS, json.dumps({**CHAT, **changes}).encode())


def message(**changes):
    return chat(messages=[{"role": "user", "content": "a", **changes}])


# What is sent, and what the refusal names.
TABLE = {
    "no body": ((COMPLETIONS, b""), "JSON"),
    "no JSON": ((COMPLETIONS, b"{'prompt': 1}"), "JSON"),
    "cut off": ((COMPLETIONS, b'{"model": "tiny", "prom'), "JSON"),
    "no UTF-8": ((COMPLETIONS, b'{"model": "\xff"}'), "UTF-8"),
    "a list": ((COMPLETIONS, b"[1, 2]"), "object"),
    "a number": ((COMPLETIONS, b"7"), "object"),
    "deep": ((COMPLETIONS, b"[" * 200_000), "nested"),
    "deep prompt": (completion(prompt=[[[[1]]]]), "prompt"),
    "NaN": ((COMPLETIONS, b'{"model": "tiny", "prompt": "a", "top_p": NaN}'), "NaN"),
    "infinity": (
        (COMPLETIONS, b'{"model": "tiny", "prompt": "a", "seed": Infinity}'),
        "Inf",
    ),
    "overflow": (
        (COMPLETIONS, b'{"model": "tiny", "prompt": "a", "top_p": 1e999}'),
        "top_p",
    ),
    "no model": ((COMPLETIONS, b'{"prompt": "a"}'), "model"),
    "no prompt": ((COMPLETIONS, b'{"model": "tiny"}'), "prompt"),
    "another model": (completion(model="large"), "large"),
    "long name": (completion(model="x" * 10_000), "model"),
    "model of a number": (completion(model=3), "model"),
    "prompt of a number": (completion(prompt=3), "prompt"),
    "prompt null": (completion(prompt=None), "prompt"),
    "empty list": (completion(prompt=[]), "prompt"),
    "no tokens": (completion(prompt=[[]]), "prompt"),
    "mixed": (completion(prompt=["a", 1]), "prompt"),
    "half a pair": ((COMPLETIONS, b'{"model":"tiny","prompt":"\\ud800"}'), "prompt"),
    "negative token": (completion(prompt=[-1]), "-1"),
    "unknown token": (completion(prompt=[10**9]), "1000000000"),
    "huge token": (completion(prompt=[10**30]), "prompt"),
    "no room": (completion(max_tokens=0), "max_tokens"),
    "negative room": (completion(max_tokens=-5), "max_tokens"),
    "too much room": (completion(max_tokens=10**9), "max_tokens"),
    "room in words": (completion(max_tokens="5"), "max_tokens"),
    "part of a token": (completion(max_tokens=1.5), "max_tokens"),
    "cold": (completion(temperature=-0.1), "temperature"),
    "in words": (completion(temperature="hot"), "temperature"),
    "no top_p": (completion(top_p=0), "top_p"),
    "much top_p": (completion(top_p=1.1), "top_p"),
    "no top_k": (completion(top_k=0), "top_k"),
    "penalty": (completion(presence_penalty=3), "presence_penalty"),
    "no choices": (completion(n=0), "n"),
    "huge n": (completion(n=10**6), "n"),
    "huge n by prompts": (completion(prompt=["a"] * 100, n=100), "n"),
    "negative seed": (completion(seed=-1), "seed"),
    "stop of numbers": (completion(stop=[1]), "stop"),
    "empty stop": (completion(stop=[""]), "stop"),
    "many stops": (completion(stop=["a"] * 100), "stop"),
    "many logprobs": (completion(logprobs=1000), "logprobs"),
    "stream in words": (completion(stream="yes"), "stream"),
    "echo": (completion(echo=True), "echo"),
    "best_of": (completion(best_of=4), "best_of"),
    "suffix": (completion(suffix="end"), "suffix"),
    "bias": (completion(logit_bias={"5": 10}), "logit_bias"),
    "unknown field": (completion(temprature=1), "temprature"),
    "no messages": (chat(messages=[]), "messages"),
    "message of text": (chat(messages=["hi"]), "messages"),
    "no content": (chat(messages=[{"role": "user"}]), "messages"),
    "another role": (message(role="tool"), "messages"),
    "picture": (message(content=[{"type": "image_url", "image_url": "x"}]), "messages"),
    "aside": (message(content="\ufdd0"), "messages"),
    "tools": (chat(tools=[{"type": "function"}]), "tools"),
    "form": (chat(response_format={"type": "json_object"}), "response_format"),
    "top_logprobs": (chat(top_logprobs=2), "top_logprobs"),
}


@pytest.fixture(scope="module")
def beside(server):
    """A stream that goes on while others send nonsense, and what it would give alone."""
    asked = {**COMPLETION, "max_tokens": 1500, "temperature": 0, "stream": True}

    def ask(texts):
        with httpx.stream(
            "POST", server.url + COMPLETIONS, json=asked, timeout=120
        ) as got:
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])

    alone, texts = [], []
    ask(alone)
    thread = threading.Thread(target=ask, args=[texts])
    thread.start()
    yield
    thread.join()
    assert "".join(texts) == "".join(alone)


@pytest.mark.parametrize("name", TABLE)
def test_nonsense_is_refused_in_one_sentence(server, beside, name):
    (path, body), named = TABLE[name]
    answer = httpx.post(server.url + path, content=body, timeout=30)
    assert answer.status_code == (
        404 if name in ("another model", "long name") else 400
    )
    problem = answer.json()["error"]
    assert named in problem["message"]
    assert len(problem["message"]) < 300 and "\n" not in problem["message"]
    assert problem["type"] == "invalid_request_error"


def test_long_bodies_are_refused_before_they_are_read(server, beside):
    body = json.dumps({**COMPLETION, "prompt": "a" * 10 * 2**20}).encode()
    assert httpx.post(server.url + COMPLETIONS, content=body).status_code == 413
    # Whose length is not said, as well.
    pieces = (body[at : at + 2**20] for at in range(0, len(body), 2**20))
    assert httpx.post(server.url + COMPLETIONS, content=pieces).status_code == 413


def test_unknown_places_and_methods_are_named(server):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/", 405),
    ):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert f"{method} {path}" in answer.json()["error"]["message"]


def test_what_is_no_http_does_no_harm(server, beside):
    host, port = server.url.removeprefix("http://").split(":")
    for content in (b"\x00\x16\x03\x01" * 100, b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(content)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": [1.5] * 200_000}, "prompt"),
        ({"prompt": [[{}]] * 200_000}, "prompt"),
        ({"prompt": "a", "stop": [1] * 200_000}, "stop"),
        ({"prompt": "a", **{f"field {n}": 1 for n in range(200_000)}}, "fields"),
    ],
)
def test_many_faults_take_no_longer_than_one(request, changes, named):
    body = json.dumps({"model": "tiny", **changes}).encode()
    gc.disable()  # a collection takes longer than either, and comes when it likes
    request.addfinalizer(gc.enable)
    start = time.thread_time()
    json.loads(body)
    read = time.thread_time()
    with pytest.raises(BadRequest, match=named):
        parse(body, CompletionRequest)
    # All are served by one thread: nobody else gets a token meanwhile.
    assert time.thread_time() - read < 20 * (read - start)


def test_numbers_that_are_none_are_refused_wherever_they_stand():
    with pytest.raises(BadRequest, match="NaN"):
        parse(b'{"model": "tiny", "prompt": [NaN]}', CompletionRequest)
