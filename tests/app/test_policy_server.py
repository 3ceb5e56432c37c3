"""The policy's API: what it lays, plays and refuses."""

import re

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("diffusers")
pytest.importorskip("fastapi")

import torch
from fastapi.testclient import TestClient
from served import size_of_page

from torchfilm.app.policy_server import create_policy_app
from torchfilm.systems.diffusion_policy import load
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary

SEED = 1


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(load())


@pytest.fixture(scope="module")
def client(policy):
    with TestClient(create_policy_app(policy)) as client:
        yield client


@pytest.fixture(scope="module")
def table(client) -> dict:
    return client.get("/api/table", params={"seed": SEED}).json()


@pytest.fixture(scope="module")
def told(client, table) -> list[dict]:
    reply = client.post("/api/tell", json={"scene": SEED, "instructions": table["examples"][0]})
    assert reply.status_code == 200
    return reply.json()["told"]


def test_a_seed_names_one_table_and_another_seed_another(client, table):
    assert client.get("/api/table", params={"seed": SEED}).json() == table
    assert client.get("/api/table", params={"seed": SEED + 1}).json()["things"] != table["things"]
    fresh = [client.get("/api/table").json()["seed"] for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_examples_tell_each_deed_in_four_manners(table):
    assert [len(texts) for texts in table["examples"]] == [4, 4, 4, 4]
    for plain, avoid, save, both in table["examples"]:
        assert not re.search("obstacle|post|energy|slowly", plain)
        for text in (avoid, both):
            assert re.search("obstacle|post", text)
        for text in (save, both):
            assert re.search("energy|slowly", text)


def test_the_arm_is_shown_from_where_it_stands_and_its_links_keep_their_length(table, told):
    for one in told:
        finger, elbow, things = (np.array(one[name]) for name in ("finger", "elbow", "things"))
        assert np.allclose(finger[0], table["finger"], atol=2e-3)
        assert np.allclose(elbow[0], table["elbow"], atol=5e-3)
        assert np.allclose(things[0], [thing["at"] for thing in table["things"]], atol=1e-3)
        assert np.allclose(np.linalg.norm(elbow, axis=1), 0.45, atol=1e-3)
        assert np.allclose(np.linalg.norm(finger - elbow, axis=1), 0.45, atol=1e-3)
        assert len(finger) == len(things) == round(20 * one["seconds"])


def test_what_is_understood_is_what_is_looked_at_most(table, told):
    for one in told:
        most = table["things"][int(np.argmax(one["looked"]))]["name"]
        assert one["understood"].startswith(f"push the {most} to the ")
        assert sum(one["looked"]) == pytest.approx(1, abs=1e-4)
        assert sum(one["places"].values()) == pytest.approx(1, abs=1e-4)
    assert len({one["understood"] for one in told}) == 1


def test_manners_change_what_is_done(told):
    plain, avoid, save, both = told
    assert plain["collisions"] > 0
    assert avoid["clearance"] > plain["clearance"]
    assert both["clearance"] > plain["clearance"]
    assert save["energy"] < 0.7 * plain["energy"]


def test_modulations_are_those_of_the_networks_own_layers(policy, told):
    network = policy.network
    words = Vocabulary(network.config.vocabulary)([told[1]["instruction"]])
    with torch.no_grad():
        blocks = network.listeners["blocks"](network.reason({"instruction": words}, 1))
    for site, modulation in blocks.items():
        part = told[1]["modulations"][site]
        assert np.allclose(part["gamma"], modulation.gamma[0], atol=1e-5)
        assert np.allclose(part["beta"], modulation.beta[0], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"scene": SEED, "instructions": ["push the blu cube"]}, 400, "blu"),
        ({"scene": SEED, "instructions": ["?!"]}, 400, "word"),
        ({"scene": SEED, "instructions": []}, 422, "instructions"),
        ({"scene": SEED, "instructions": ["go"] * 5}, 422, "instructions"),
        ({"scene": SEED, "instructions": ["x" * 201]}, 422, "instructions.0"),
        ({"scene": -1, "instructions": ["go"]}, 422, "scene"),
        ({"instructions": ["go"]}, 422, "scene"),
        ({"scene": SEED, "instructions": ["go"], "how": "well"}, 422, "how"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(client, body, status, reason):
    reply = client.post("/api/tell", json=body)
    assert reply.status_code == status
    assert reason in reply.json()["error"]
    assert "Traceback" not in reply.text


def test_the_api_is_described_and_the_page_needs_nothing_from_elsewhere(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/api/health", "/api/table", "/api/tell"}
    for path in described["paths"].values():
        for operation in path.values():
            assert operation["summary"]
    others = ("policy.js", "shared.js", "policy.css", "page.css")
    assert size_of_page(client, "policy.html", others, known="http://www.w3.org/2000/svg") < 50_000
