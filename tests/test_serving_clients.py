"""Programs that know OpenAI's interface, against ``serve`` as a program: the openai package, llm and curl."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from endpoints import SERVE, program
from hf_models import with_template
from programs import Program, error_line

from crypten_llm import PrivateLlama

KEY = "0123456789abcdef0123456789abcdef"
SAID = [{"role": "user", "content": "The passkey is 4711."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain", threads=1) as llama:
        return llama.generate(messages=SAID, max_new_tokens=6).text


@pytest.fixture(scope="module")
def url(model):
    options = ["--engine", "plain", "--model", model, "--name", "tiny"]
    with program(*options, CRYPTEN_LLM_API_KEY=KEY) as (served, url):
        served.read_until("requests are answered")
        yield url


def test_the_openai_package(url, expected):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "messages": SAID, "max_tokens": 6}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 6
        assert whole.model_extra["crypten_llm"]["revealed"]
        with client.chat.completions.create(**asked, stream=True) as pieces:
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        likely = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert len(likely.choices[0].logprobs.content[0].top_logprobs) == 2
        text = client.completions.create(model="tiny", prompt="The passkey", max_tokens=2, n=2, logprobs=1)
        assert len(text.choices) == 2 and len(text.choices[0].logprobs.tokens) == 2
        # What is said back is a conversation that can be gone on with.
        again = [*SAID, whole.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
        assert client.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="temperature is -1"):
            client.chat.completions.create(**asked, temperature=-1)
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.chat.completions.create(**{**asked, "model": "other"})
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x" * 32, max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_llm(url, expected, tmp_path):
    entry = {"model_id": "private", "model_name": "tiny", "api_base": f"{url}/v1", "api_key_name": "private"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (tmp_path / "keys.json").write_text(json.dumps({"private": KEY}))
    plain = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}  # no models of others
    command = [sys.executable, "-m", "llm", "-m", "private", "-o", "max_tokens", "6", SAID[0]["content"]]
    ended = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == expected.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl(url, expected):
    def curl(path, *options):
        command = ["curl", "-sS", "--no-buffer", "--max-time", "20", *options, f"{url}{path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    asked = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}", "-d"]
    body = {"messages": SAID, "max_tokens": 6}
    found = json.loads(curl("/v1/chat/completions", *asked, json.dumps(body)))
    assert found["choices"][0]["message"]["content"] == expected
    lines = curl("/v1/chat/completions", *asked, json.dumps({**body, "stream": True})).splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(c["delta"].get("content", "") for p in pieces for c in p["choices"]) == expected
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(curl("/health"))["state"] == "Available"
    assert json.loads(curl("/v1/models"))["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(model, number):
    with program("--engine", "plain", "--model", model) as (served, _):
        served.read_until("requests are answered")
        served.process.send_signal(number)
        code, _, err = served.finish()
        assert code == 0 and "Traceback" not in err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--listen", "0.0.0.0"], "--https"),
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "0"], "--queue is 0"),
        (["--tape", "x", "--engine", "wire"], "leave --tape out"),
        (["--https", "no.crt", "no.key"], "--https: no.crt"),
        (["--api-keys", "no.txt"], "no.txt: cannot be read"),
    ],
)
def test_what_cannot_be_served(options, says):
    with Program(*SERVE, "--engine", "plain", *options) as served:
        code, _, err = served.finish()
        assert code == 2 and says in error_line(err)


def test_a_port_in_use_and_parties_that_others_started(url, model):
    port = url.rpartition(":")[2]
    with Program(*SERVE, "--engine", "plain", "--model", model, "--port", port) as served:
        code, _, err = served.finish()
        assert code == 2 and "choose another --port" in error_line(err)
    with Program(*SERVE, "--local", RANK="1", WORLD_SIZE="3") as served:
        code, _, err = served.finish()
        assert code == 2 and "--local starts all parties here" in error_line(err)
