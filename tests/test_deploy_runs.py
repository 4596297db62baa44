"""The three parties as deploy/compose.yaml starts them: its keys, its command lines, on this machine's loopback."""

import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import httpx2
import pytest
from deployed import compose, of_compose
from programs import ROOT, Program, free_port

from crypten_llm.errors import PartyError

PROMPT = "Document 1: Kenji has a job at Indigo.\nQuestion: Where does Kenji work?\nAnswer:"


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_the_trial_answers_and_ends_with_a_party_that_dies(tmp_path):
    (script,) = compose()["services"]["keys"]["command"]
    for role in ("owner", "client", "dealer"):
        (tmp_path / role).mkdir(mode=0o700)
    script = script.replace("/trial", str(tmp_path)).replace("$$", "$")
    script = script.replace("crypten-llm keys", f"{sys.executable} -m crypten_llm keys")
    subprocess.run(["/bin/sh", "-euc", script], cwd=ROOT, check=True, capture_output=True, timeout=60)
    meeting, links = free_port(), free_port()
    places = {
        **{"/trial": str(tmp_path), "=client-links": "=127.0.0.1", "--link-port=29501": f"--link-port={links}"},
        **{"--port=8000": "--port=0", "--listen=0.0.0.0": "--listen=0.0.0.0"},
    }

    def here(word):
        for there, instead in places.items():
            word = word.replace(there, instead)
        return word

    with ExitStack() as running:
        parties = {}
        for one in of_compose():
            told = one.environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)}
            words = [here(word) for word in one.arguments]
            program = Program("-m", "crypten_llm", *words, "--threads", "1", **told)
            parties[one.role] = running.enter_context(program)
        (port,) = re.findall(r"endpoint https://0.0.0.0:(\d+)/v1", parties["client"].read_until("endpoint "))
        parties["client"].read_until("requests are answered")
        key = (tmp_path / "client" / "api-key").read_text().strip()
        certificate = str(tmp_path / "client" / "endpoint.crt")
        with httpx2.Client(base_url=f"https://localhost:{port}", verify=certificate, timeout=60) as http:
            assert http.get("/health").json()["state"] == "Available"
            assert http.get("/metrics").status_code == 401, "a scraper brings the key"
            http.headers["Authorization"] = f"Bearer {key}"
            assert "crypten_llm_waiting_requests 0.0" in http.get("/metrics").text
            answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "stream": False}).json()
            assert answer["choices"][0]["text"].startswith(" Indigo")
        parties["dealer"].process.send_signal(signal.SIGKILL)
        for role in ("client", "owner"):
            code, _, err = parties[role].finish()
            assert code == PartyError.exit_code and "rank 2 (dealer)" in err, "it is to be started again"
