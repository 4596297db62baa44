"""The files of deploy/ are valid by published schemas; what they start, probe, open and measure is what there is."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, IMAGE, ROLES, commands_in, compose, kustomization, of_kind, pod, resources, started, units

from crypten_llm.commands import cli
from crypten_llm.errors import UsageError
from crypten_llm.serving.app import Endpoint
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.service import STOP_SECONDS
from experiments.replicas.scaler import REFUSALS, RUNNING, WAITING

ROOT = DEPLOY.parent
PAGE = ROOT / "docs" / "deploying.md"
OLDEST = "1.33"  # of Kubernetes: since then a StatefulSet needs no headless Service
LAYERS = [(role, layer) for role in ROLES for layer in ("base", "site")]
HARDENED = {
    **{"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes"},
    **{"CapabilityBoundingSet": "", "SystemCallFilter": "@system-service", "LimitCORE": "0", "MemorySwapMax": "0"},
    **{"RestrictNamespaces": "yes", "LockPersonality": "yes", "IPAddressDeny": "any", "Restart": "always"},
}
KUSTOMIZE = {"apiVersion", "kind", "resources", "namespace", "images", "replicas", "patches"}


def tool(*command, cwd=ROOT):
    """What a checker says, which must be satisfied."""
    ended = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def parsed(words):
    """By the command line's own parser. Raises UsageError for what there is not."""
    return cli._parser().parse_args(words)


def test_the_folder_has_nothing_else():
    names = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()}
    listed = {f"kubernetes/{role}/{layer}/{name}" for role, layer in LAYERS for name in files(role, layer)}
    listed |= {f"kubernetes/{role}/stock/{name}" for role in ROLES for name in files(role, "stock")}
    systemd = {f"systemd/crypten-llm-{role}.service" for role in ROLES}
    assert names == {"Dockerfile", "Dockerfile.dockerignore", "compose.yaml"} | systemd | listed
    assert not any("PRIVATE KEY" in (DEPLOY / name).read_text("utf-8") for name in names)


def files(role, layer):
    listed = kustomization(role, layer).get("resources", [])
    return {"kustomization.yaml", *(name for name in listed if name.endswith(".yaml"))}


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_takes_every_resource(version):
    found = [resource for role, layer in LAYERS for resource in resources(role, layer)]
    assert len(found) > 12
    for resource in found:
        kubernetes_validate.validate(resource, version, strict=True)
    (wrong,) = of_kind("StatefulSet", "owner")
    wrong["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_a_site_changes_what_its_base_has(role):
    base, site = kustomization(role, "base"), kustomization(role, "site")
    assert base.keys() | site.keys() <= KUSTOMIZE and site["resources"][0] == "../base"
    known = {(resource["kind"], resource["metadata"]["name"]) for resource in resources(role, "base")}
    assert all(("StatefulSet", each["name"]) in known for each in site.get("replicas", []))
    assert all((each["target"]["kind"], each["target"]["name"]) in known for each in site.get("patches", []))
    assert [each["name"] for each in site["images"]] == [IMAGE]
    containers = [*pod(role)["initContainers"], *pod(role)["containers"]]
    assert {container["image"] for container in containers} == {IMAGE}
    first = [parsed(each["args"]).run.__module__ for each in pod(role)["initContainers"] if "args" in each]
    assert first == ["crypten_llm.commands.verbs.doctor"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("role, layer", LAYERS)
def test_kustomize_builds_it(role, layer):
    built = list(yaml.safe_load_all(tool("kubectl", "kustomize", DEPLOY / "kubernetes" / role / layer)))
    for resource in built:
        kubernetes_validate.validate(resource, OLDEST, strict=True)
    (party,) = (resource["spec"] for resource in built if resource["kind"] == "StatefulSet")
    if layer == "site":
        (scaler,) = [r["spec"]["maxReplicas"] for r in built if r["kind"] == "HorizontalPodAutoscaler"] or [None]
        assert (scaler or party["replicas"]) == 2, "groups, alike at all three"
        ways = {r["metadata"]["name"] for r in built if r["kind"] == "Service"} - {"endpoint"}
        assert ways == (set() if role == "dealer" else {f"{role}-0", f"{role}-1"})


def test_compose_takes_its_file(tmp_path):
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    tool(*check, DEPLOY / "compose.yaml")
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(json.dumps(compose() | {"service": {}}))
    with pytest.raises(AssertionError, match="service"):
        tool(*check, wrong)
    assert "protect nobody" in (DEPLOY / "compose.yaml").read_text("utf-8").partition("name:")[0]


def test_parties_of_the_trial_share_no_key_and_no_network():
    services = {role: compose()["services"][role] for role in ROLES}
    volumes = {role: {volume.split(":")[0] for volume in services[role]["volumes"]} for role in ROLES}
    assert not set.intersection(*volumes.values()) and len(set.union(*volumes.values())) == sum(
        map(len, volumes.values())
    )
    networks = compose()["networks"]
    for name in {name for role in ROLES for name in services[role]["networks"]} - {"endpoint"}:
        assert networks[name] == {"internal": True}
        assert sum(name in services[role]["networks"] for role in ROLES) == 2


@pytest.mark.parametrize("one", started(), ids=lambda one: f"{one.where}-{one.role}")
def test_every_party_starts_as_the_program_takes_it(one):
    arguments = parsed(one.arguments)
    assert one.environment["RANK"] == str(ROLES.index(one.role)) and one.environment["WORLD_SIZE"] == str(len(ROLES))
    assert arguments.tls in one.folders and not arguments.insecure_links and arguments.offline
    assert one.environment["MASTER_ADDR"].startswith("owner")
    if one.role == "client":
        assert arguments.run.__module__.endswith("verbs.serve") and arguments.end_with_parties and arguments.api_keys
        assert arguments.link_port and arguments.host not in ("", "0.0.0.0")
        assert (arguments.listen == "127.0.0.1") is (arguments.https is None)
    else:
        assert arguments.run.__module__.endswith("verbs.party")
        assert (arguments.host == "0.0.0.0") is bool(arguments.model) is (one.role == "owner")


def test_all_parties_agree_on_where_they_meet():
    for where in ("compose", "systemd", "kubernetes"):
        found = {one.role: one.environment for one in started() if one.where == where}
        assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found.values()}) == 1


def test_an_option_that_there_is_not_is_found():
    for words in (["party", "--modle", "x"], ["owner"], ["serve", "--port", "many"]):
        with pytest.raises(UsageError):
            parsed(words)
    found = commands_in("umask 077\ncrypten-llm keys $$role --out k  # made\n/opt/bin/crypten-llm keys a | b")
    assert found == [["keys", "$role", "--out", "k"], ["keys", "a"]]


def test_scripts_and_the_page_name_commands_that_there_are():
    (script,) = compose()["services"]["keys"]["command"]
    made = [parsed(words).role for words in commands_in(script)]
    assert made == ROLES
    page = PAGE.read_text("utf-8")
    shown = commands_in("\n".join(re.findall(r"```\w*\n(.+?)```", page, re.DOTALL) + re.findall(r"`([^`\n]+)`", page)))
    assert len(shown) > 8
    for words in shown:
        parsed(words)


def test_ports_are_those_of_the_command_lines():
    one = {each.role: each for each in started() if each.where == "kubernetes"}
    meeting, client = int(one["owner"].environment["MASTER_PORT"]), parsed(one["client"].arguments)
    assert one["owner"].ports == {meeting} and one["client"].ports == {client.port, client.link_port}
    assert one["dealer"].ports == set()
    opened = {"owner": meeting, "client": client.link_port}
    for role in ROLES:
        for layer in ("base", "site"):
            for service in of_kind("Service", role, layer):
                (port,) = service["spec"]["ports"]
                outside = service["spec"].get("type") == "LoadBalancer"
                assert outside is (service["spec"].get("externalTrafficPolicy") == "Local"), "policies see addresses"
                assert port["port"] == (client.port if service["metadata"]["name"] == "endpoint" else opened[role])
                assert port["targetPort"] in [named["name"] for named in pod(role)["containers"][0]["ports"]]
        (policy,) = of_kind("NetworkPolicy", role)
        dialled = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} - {53}
        assert dialled == {"owner": set(), "client": {meeting}, "dealer": {meeting, client.link_port}}[role]
    published = {each.role: each.ports for each in started() if each.where == "compose"}
    assert published == {"owner": set(), "client": {client.port}, "dealer": set()}


def test_probes_ask_what_the_endpoint_answers():
    routes = {route.path for route in Endpoint(None, None, "model").app().routes}
    (container,) = pod("client")["containers"]
    client = parsed(next(each for each in started() if each.where == "kubernetes" and each.role == "client").arguments)
    for name in ("startupProbe", "readinessProbe"):
        probe = container[name]["httpGet"]
        assert probe["path"] in routes and probe["port"] == "endpoint"
        assert probe["scheme"] == ("HTTPS" if client.https else "HTTP")
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > client.timeout
    grace = pod("client")["terminationGracePeriodSeconds"]
    (until,) = re.findall(r"monotonic\(\) \+ (\d+)", drain())
    assert int(until) + STOP_SECONDS < grace
    assert all("livenessProbe" not in pod(role)["containers"][0] for role in ("owner", "dealer")), (
        "nothing to ask there"
    )


def test_scaling_is_by_metrics_that_are_exported():
    (scaler,) = of_kind("HorizontalPodAutoscaler", "client")
    exported = set(re.findall(r"^# TYPE (\w+)", Metrics(lambda: 0, lambda: 0, lambda: 0).text().decode(), re.MULTILINE))
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert names == {WAITING, RUNNING, REFUSALS} and {WAITING, RUNNING, f"{REFUSALS}_total"} <= exported
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", of_kind("StatefulSet", "client")[0]["metadata"]["name"])
    assert "replicas" not in of_kind("StatefulSet", "client")[0]["spec"], "the scaler's to say"
    named = set(re.findall(r"\bcrypten_llm_[a-z_]+[a-z]\b", PAGE.read_text("utf-8")))
    of_producers = {"crypten_llm_stock_missing_blocks"}  # tests/test_deploy_stock.py
    assert names <= named <= exported | {REFUSALS} | of_producers, "the first as the rate that the adapter makes of it"


def drain():
    return pod("client")["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


@contextmanager
def answering(*answers):
    """A server that gives each of these (status, body) once, and the last for ever."""
    coming = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = coming.pop(0) if len(coming) > 1 else coming[0]
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    asked = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_client_that_is_stopped_waits_for_its_answers(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    busy, idle = {"waiting": 0, "running": 2}, {"waiting": 0, "running": 0}
    for answers, asked_times in (([(200, busy), (200, busy), (200, idle)], 3), ([(503, busy)], 1)):
        with answering(*answers) as (url, asked):
            exec(drain().replace("https://127.0.0.1:8000", url), {})
        assert asked == ["/health"] * asked_times
    assert slept == [5, 2, 2, 5]


def test_the_trials_health_is_the_endpoints():
    script = compose()["services"]["client"]["healthcheck"]["test"][-1]
    for status in (200, 503):
        with answering((status, {})) as (url, asked):
            if status == 200:
                exec(script.replace("https://127.0.0.1:8000", url), {})
            else:
                with pytest.raises(OSError):
                    exec(script.replace("https://127.0.0.1:8000", url), {})
        assert asked == ["/health"]


@pytest.mark.parametrize("role", ROLES)
def test_pods_may_do_nothing_but_compute(role):
    spec = pod(role)
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    for container in [*spec["initContainers"], *spec["containers"]]:
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"]
        assert locked["capabilities"] == {"drop": ["ALL"]} and container["resources"]["limits"]["memory"]
    (budget,) = of_kind("PodDisruptionBudget", role)
    labels = of_kind("StatefulSet", role)[0]["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("role", ROLES)
def test_units_are_hardened_and_hold_their_own_key_alone(role, tmp_path):
    settings = units()[role]
    assert {name: settings[name][0] for name in HARDENED} == HARDENED
    loaded = dict(each.split(":") for each in settings["LoadCredential"])
    wanted = {f"{role}.key", *(f"{each}.crt" for each in ROLES)} | ({"api-keys"} if role == "client" else set())
    assert loaded == {name: f"/etc/crypten-llm/keys/{name}" for name in wanted}
    copied = {Path(word).name for word in settings["ExecStartPre"][0].split() if "CREDENTIALS" in word}
    assert copied == wanted
    if shutil.which("systemd-analyze"):
        unit = DEPLOY / "systemd" / f"crypten-llm-{role}.service"
        copy = tmp_path / unit.name
        copy.write_text(unit.read_text("utf-8").replace("/opt/crypten-llm/bin/crypten-llm", "/bin/true"))
        assert tool("systemd-analyze", "verify", copy) == ""


def test_the_image_holds_no_key_and_runs_as_nobody():
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    tool(Path(sys.executable).parent / "hadolint", DEPLOY / "Dockerfile")
    steps = [line.split() for line in text.splitlines()]
    sources = {word for step in steps if step[:1] == ["COPY"] and "--from=build" not in step for word in step[1:-1]}
    assert all((ROOT / source).exists() for source in sources)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert "**/*.key" in rules
    users = [step[1] for step in steps if step[:1] == ["USER"]]
    assert users == ["10001:10001"] and 'ENTRYPOINT ["crypten-llm"]' in text
    assert re.search(r"^torch==\d", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for role in ROLES:
        assert str(pod(role)["securityContext"]["runAsUser"]) == users[0].split(":")[0]
