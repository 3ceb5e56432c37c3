"""The API behind the page: what it answers, and how it refuses what it cannot."""

import asyncio
import base64
import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from served import size_of_page

from torchfilm.app.limits import BodyLimit, Limits
from torchfilm.app.scenes import FreshScene, RenderedScenes
from torchfilm.app.server import create_app
from torchfilm.app.serving import Running, serve_app
from torchfilm.systems.visual_reasoning.answering import Answerer

QUESTION = "How many red cubes are there?"


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of the application, over real HTTP."""
    running = Running(app, port=0)
    try:
        with httpx.Client(base_url=running.address, timeout=20, trust_env=False) as client:
            yield client
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(answerer: Answerer, scenes: RenderedScenes) -> Iterator[httpx.Client]:
    with serving(create_app(answerer, scenes)) as client:
        yield client


def png(width: int = 90, height: int = 60, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def shown(data_url: str) -> np.ndarray:
    head, content = data_url.split(",")
    assert head == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))))


def refused(reply: httpx.Response, status: int, reason: str) -> None:
    """The reply is this status with this reason and shows nothing of the inside."""
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert re.search(reason, reply.json()["error"]), reply.json()
    assert "Traceback" not in reply.text
    assert ".py" not in reply.text


# ---------------------------------------------------------------- what it answers


def test_a_seed_names_one_scene_and_another_seed_another(client):
    first, again, other = (client.get("/api/scene", params={"seed": seed}).json() for seed in (7, 7, 8))
    assert first == again
    assert first["image"] != other["image"]
    assert shown(first["image"]).shape == (320, 480, 3)


def test_a_scene_without_a_seed_is_a_fresh_one(client):
    assert client.get("/api/scene").json()["seed"] != client.get("/api/scene").json()["seed"]


def test_example_questions_are_understood_and_have_known_answers(client, vocabulary):
    examples = client.get("/api/scene", params={"seed": 7}).json()["examples"]
    assert len(examples) == 5
    for example in examples:
        assert example["answer"] in vocabulary.answers
        reply = client.post("/api/ask", json={"scene": 7, "question": example["question"]})
        assert reply.json()["answer"] in vocabulary.answers


def test_the_facts_of_a_scene_are_told_only_when_asked_for(client, scenes):
    assert client.get("/api/scene", params={"seed": 7}).json()["facts"] is None
    facts = client.get("/api/scene", params={"seed": 7, "facts": True}).json()["facts"]
    assert facts == [dict(fact) for fact in scenes.make(7).facts]
    assert set(facts[0]) == {"size", "color", "material", "shape"}


def test_the_reply_is_the_networks_own_answer_at_its_own_size(client, answerer, scenes):
    reply = client.post("/api/ask", json={"scene": 11, "question": QUESTION, "top": 3}).json()
    expected = answerer.answer(scenes.make(11).small, QUESTION, top=3)
    assert reply["answer"] == expected.answer
    assert reply["probability"] == pytest.approx(expected.probability)
    assert [item["answer"] for item in reply["probabilities"]] == [a for a, _ in expected.probabilities]
    assert reply["looked"] == expected.looked
    assert reply["tokens"] == list(expected.tokens)
    assert reply["modulations"]["block1"]["gamma"] == pytest.approx(expected.modulations["block1"]["gamma"])


def test_a_turned_channel_is_applied_and_changes_the_probabilities(client):
    plain = client.post("/api/ask", json={"scene": 7, "question": QUESTION}).json()
    edits = {"block2": {"gamma": {"3": -4.0}, "beta": {"0": 2.5}}}
    turned = client.post("/api/ask", json={"scene": 7, "question": QUESTION, "edits": edits}).json()
    assert turned["modulations"]["block2"]["gamma"][3] == -4.0
    assert turned["modulations"]["block2"]["beta"][0] == 2.5
    assert turned["modulations"]["block1"] == plain["modulations"]["block1"]
    assert turned["probabilities"] != plain["probabilities"]


def test_an_uploaded_picture_is_shown_as_the_network_sees_it_and_can_be_asked_about(client, answerer):
    content = png(200, 100)
    upload = client.post("/api/upload", files={"file": ("mine.png", content)}).json()
    assert shown(upload["image"]).shape == (320, 480, 3)
    reply = client.post("/api/ask", json={"image": upload["id"], "question": QUESTION}).json()
    assert reply["probability"] == pytest.approx(answerer.answer(content, QUESTION).probability)


def test_a_sloppily_typed_question_is_understood(client):
    reply = client.post("/api/ask", json={"scene": 7, "question": " how many RED cubes are there"}).json()
    assert reply["tokens"] == ["How", "many", "red", "cubes", "are", "there"]


def test_the_server_says_that_it_is_up(client):
    assert client.get("/api/health").json()["status"] == "ok"


def test_the_api_is_described_with_examples_and_errors(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/api/health", "/api/scene", "/api/upload", "/api/ask"}
    for path in described["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert {"200", "400", "413", "429", "503"} <= set(operation["responses"])
    assert described["components"]["schemas"]["AskRequest"]["properties"]["question"]["examples"]


# ---------------------------------------------------------------- the page


def test_the_page_is_light_and_needs_nothing_from_elsewhere(client):
    assert size_of_page(client, "index.html", ("page.js", "shared.js", "page.css")) < 60_000


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"scene": 7, "question": ""}, 400, "the question is empty"),
        (
            {"scene": 7, "question": "How many red sphears?"},
            400,
            "unknown word 'sphears'; the nearest known words are",
        ),
        ({"scene": 7, "question": "red " * 200}, 422, "question: String should have at most 500 characters"),
        ({"scene": 7}, 422, "question: Field required"),
        ({"question": QUESTION}, 422, "give either 'scene' .* or 'image'"),
        ({"scene": 7, "image": "0123", "question": QUESTION}, 422, "give either 'scene' .* or 'image'"),
        ({"image": "0123", "question": QUESTION}, 404, "this picture is no longer here; upload it again"),
        ({"scene": -1, "question": QUESTION}, 422, "scene: Input should be greater than or equal to 0"),
        ({"scene": 2**32, "question": QUESTION}, 422, "scene: Input should be less than or equal to"),
        (
            {"scene": 7, "question": QUESTION, "edits": {"block9": {}}},
            400,
            "no site 'block9'; expected one of block1",
        ),
        (
            {"scene": 7, "question": QUESTION, "edits": {"block1": {"delta": {"0": 1}}}},
            422,
            "edits.block1.delta",
        ),
        (
            {"scene": 7, "question": QUESTION, "edits": {"block1": {"beta": {"8": 1}}}},
            400,
            "no channel 8; expected 0 to 7",
        ),
        (
            {"scene": 7, "question": QUESTION, "edits": {"block1": {"beta": {"x": 1}}}},
            422,
            "edits.block1.beta.x",
        ),
        (
            {"scene": 7, "question": QUESTION, "edits": {"block1": {"beta": {"1": 1e9}}}},
            400,
            "between -1000 and 1000",
        ),
        (
            {"scene": 7, "question": QUESTION, "top": 0},
            422,
            "top: Input should be greater than or equal to 1",
        ),
        ({"scene": 7, "question": QUESTION, "colour": "red"}, 422, "colour: Extra inputs are not permitted"),
        ([1, 2], 422, "Input should be a valid dictionary"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(client, body, status, reason):
    refused(client.post("/api/ask", json=body), status, reason)


def test_an_unknown_word_comes_with_the_nearest_known_ones(client, vocabulary):
    body = client.post("/api/ask", json={"scene": 7, "question": "how many red sphears"}).json()
    assert body["word"] == "sphears"
    assert "spheres" in body["nearest"]
    assert set(body["nearest"]) <= set(vocabulary.questions)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"scene": 7,', "the body is no JSON: .* at character"),
        (b"", "Field required"),
        (b"\xff\xfe", "no JSON|parsing"),
    ],
)
def test_a_body_that_is_no_json_is_refused(client, content, reason):
    reply = client.post("/api/ask", content=content, headers={"content-type": "application/json"})
    refused(reply, reply.status_code, reason)
    assert reply.status_code in (400, 422)


def test_a_value_that_is_no_number_is_refused(client):
    content = b'{"scene": 7, "question": "How many cubes?", "edits": {"block1": {"gamma": {"0": NaN}}}}'
    reply = client.post("/api/ask", content=content, headers={"content-type": "application/json"})
    refused(reply, 400, r"edit of block1.gamma\[0\]: expected a number between")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image is empty"),
        (b"no picture at all", "image is no image: expected a PNG or JPEG file, got 17 bytes of text"),
        (png()[:4000], "image is a damaged image"),
        (png(9, 9), "image of 9x9 pixels: expected at least 16"),
    ],
)
def test_an_upload_that_is_no_picture_is_refused(client, content, reason):
    refused(client.post("/api/upload", files={"file": ("mine.png", content)}), 400, reason)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(client):
    stream = io.BytesIO()
    Image.new("1", (8000, 8000)).save(stream, "PNG")
    refused(client.post("/api/upload", files={"file": stream.getvalue()}), 400, "too large: 8000x8000 pixels")


def test_an_upload_without_a_file_is_refused(client):
    refused(client.post("/api/upload"), 422, "file: Field required")
    refused(client.post("/api/upload", data={"file": "text"}), 422, "file: ")


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/nowhere", 404, "there is nothing at /nowhere; the page is at /"),
        ("GET", "/../server", 404, "there is nothing at /server"),
        ("GET", "/api/ask", 405, "GET is not possible at /api/ask"),
        ("POST", "/api/health", 405, "POST is not possible at /api/health"),
        ("GET", "/api/scene?seed=seven", 422, "seed: Input should be a valid integer"),
        ("GET", "/api/scene?seed=-1", 422, "seed: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_address_or_method_is_refused(client, method, path, status, reason):
    refused(client.request(method, path), status, reason)


# ---------------------------------------------------------------- limits


@dataclass
class Stubborn:
    """Always the same scene, after waiting for `free`; or the error, where there is one."""

    scene: FreshScene
    free: threading.Event
    error: Exception | None = None

    def make(self, seed: int) -> FreshScene:
        self.free.wait(10)
        if self.error is not None:
            raise self.error
        return self.scene


def test_a_body_that_is_too_large_is_refused_unread(answerer, scenes):
    app = create_app(answerer, scenes, Limits(body_bytes=1000))
    with serving(app) as client:
        refused(
            client.post("/api/upload", files={"file": png()}), 413, "too large: expected at most 1,000 bytes"
        )
        pieces = iter([b"x" * 600, b"x" * 600])
        refused(client.post("/api/ask", content=pieces), 413, "too large: expected at most 1,000 bytes")
        assert client.get("/api/health").status_code == 200


def test_work_that_takes_too_long_ends_in_503_and_the_server_goes_on(answerer, scenes):
    slow = Stubborn(scenes.make(7), threading.Event())
    with serving(create_app(answerer, slow, Limits(seconds=0.5))) as client:
        begun = time.monotonic()
        reply = client.get("/api/scene", params={"seed": 7})
        assert time.monotonic() - begun < 5
        refused(reply, 503, "no answer within 0.5 seconds")
        assert reply.headers["retry-after"] == "5"
        slow.free.set()
        deadline = time.monotonic() + 20
        while client.get("/api/scene", params={"seed": 7}).status_code != 200:
            assert time.monotonic() < deadline


def test_more_requests_than_may_wait_are_told_to_come_back(answerer, scenes):
    slow = Stubborn(scenes.make(7), threading.Event())
    with serving(create_app(answerer, slow, Limits(seconds=0.5, waiting=1))) as client:
        refused(client.get("/api/scene"), 503, "no answer within")  # it still runs, and holds the only place
        reply = client.get("/api/scene")
        refused(reply, 429, "busy: 1 requests are waiting; try again")
        assert reply.headers["retry-after"] == "1"
        slow.free.set()


def test_a_mistake_of_the_server_is_logged_and_not_shown(answerer, scenes, caplog):
    free = threading.Event()
    free.set()
    broken = Stubborn(scenes.make(7), free, RuntimeError("the inside of the server"))
    with serving(create_app(answerer, broken)) as client:
        reply = client.get("/api/scene")
    refused(reply, 500, "the server made a mistake; its log says which")
    assert "inside" not in reply.text
    assert "the inside of the server" in caplog.text


def test_only_the_most_recent_pictures_are_kept(answerer, scenes):
    with serving(create_app(answerer, scenes, Limits(pictures=2))) as client:
        ids = [client.post("/api/upload", files={"file": png(seed=seed)}).json()["id"] for seed in range(3)]
        asked = [client.post("/api/ask", json={"image": name, "question": QUESTION}) for name in ids]
    assert [reply.status_code for reply in asked] == [404, 200, 200]


def test_a_request_that_never_ends_is_refused():
    sent = []

    async def app(scope, receive, send):
        pytest.fail("the application must not see half a request")

    async def receive():
        await asyncio.sleep(5)
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    limited = BodyLimit(app, Limits(body_seconds=0.05))
    asyncio.run(limited({"type": "http", "method": "POST", "path": "/api/ask"}, receive, send))
    assert sent[0]["status"] == 408
    assert b"the request was not complete after 0.05 seconds" in sent[1]["body"]


# ---------------------------------------------------------------- running


def test_a_running_server_tells_its_address_and_ends_when_told(answerer, scenes):
    running = Running(create_app(answerer, scenes), port=0)
    assert httpx.get(f"{running.address}/api/health", timeout=10, trust_env=False).json()["status"] == "ok"
    running.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.address}/api/health", timeout=1, trust_env=False)


def test_serving_tells_the_address_and_ends_with_ctrl_c(answerer, scenes, monkeypatch):
    addresses, replies = [], []

    def wait(running: Running) -> None:
        replies.append(httpx.get(f"{running.address}/api/health", timeout=10, trust_env=False).status_code)
        raise KeyboardInterrupt

    monkeypatch.setattr(Running, "wait", wait)
    serve_app(create_app(answerer, scenes), port=0, ready=addresses.append)
    assert replies == [200]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{addresses[0]}/api/health", timeout=1, trust_env=False)


def test_a_port_that_is_taken_is_refused(answerer, scenes):
    running = Running(create_app(answerer, scenes), port=0)
    port = int(running.address.rsplit(":", 1)[1])
    try:
        with pytest.raises(
            ValueError, match=f"cannot listen on 127.0.0.1 port {port}: .*; choose another port"
        ):
            serve_app(create_app(answerer, scenes), port=port)
        with pytest.raises(ValueError, match="cannot listen on port 99999: expected 0"):
            serve_app(create_app(answerer, scenes), port=99999)
    finally:
        running.stop()
