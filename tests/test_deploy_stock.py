"""The files of deploy/ for a stock: components that change what their base has, valid by published schemas."""

import copy
import re

import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, IMAGE, ROLES, of_kind, resources
from prometheus_client import generate_latest
from test_deploy import OLDEST, parsed

from crypten_llm.commands.stock import read_levels
from crypten_llm.links.tls import name_of
from crypten_llm.serving.stock_metrics import KeeperMetrics, ProducerMetrics

PORT = 29601


def component(role):
    return yaml.safe_load((DEPLOY / "kubernetes" / role / "stock" / "kustomization.yaml").read_text("utf-8"))


def patched(role):
    """The base with the component's patches: additions to what is there."""
    found = copy.deepcopy(resources(role, "base"))
    for patch in component(role).get("patches", []):
        target = patch["target"]
        (resource,) = [
            each for each in found if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for change in yaml.safe_load(patch["patch"]):
            assert change["op"] == "add"
            *way, last = [int(part) if part.isdigit() else part for part in change["path"].split("/")[1:]]
            place = resource
            for part in way:
                place = place[part]
            if last == "-":
                place.append(change["value"])
            else:
                assert last not in place, "an addition replaces nothing"
                place[last] = change["value"]
    return [*found, *resources(role, "stock")] if "resources" in component(role) else found


def of(found, kind, name):
    (one,) = [each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return one


@pytest.mark.parametrize("role", ROLES)
def test_what_a_component_makes_is_valid(role):
    assert component(role)["kind"] == "Component"
    for resource in patched(role):
        kubernetes_validate.validate(resource, OLDEST, strict=True)


@pytest.mark.parametrize("role", ["owner", "client"])
def test_a_party_and_its_keeper_share_a_folder(role):
    found = patched(role)
    spec = of(found, "StatefulSet", role)["spec"]
    party, keeper = spec["template"]["spec"]["containers"]
    assert party["args"][-2:] == ["--stock", "/stock"]
    told = parsed(keeper["args"])
    assert (told.role, told.stock, told.port, bool(told.levels)) == (role, "/stock", PORT, role == "client")
    assert told.tls == "/keys" and not told.insecure_links and keeper["image"] == IMAGE
    for container in (party, keeper):
        assert "/stock" in {mount["mountPath"] for mount in container["volumeMounts"]}
    claim = next(each for each in spec["volumeClaimTemplates"] if each["metadata"]["name"] == "stock")
    assert int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) > told.most_gigabytes
    ports = {port["name"]: port["containerPort"] for port in keeper["ports"]}
    assert ports == {"stock": PORT, "metrics": told.metrics_port}
    assert PORT in {port["port"] for port in of(found, "Service", f"{role}-0")["spec"]["ports"]}
    open_to = [
        rule for rule in of(found, "NetworkPolicy", role)["spec"]["ingress"] if rule["ports"][0]["port"] == "stock"
    ]
    assert [rule["from"] for rule in open_to] == [[{"ipBlock": {"cidr": "203.0.113.0/24"}}]], "the dealer's alone"


def test_levels_are_read_as_they_stand(tmp_path):
    (levels,) = [each for each in patched("client") if each["metadata"]["name"] == "crypten-llm-levels"]
    path = tmp_path / "levels.json"
    path.write_text(levels["data"]["levels.json"])
    assert [level.blocks for level in read_levels(str(path))] == [8, 4]


def test_producers_have_a_key_each_and_are_scaled_by_what_lacks():
    found = patched("dealer")
    producers = of(found, "StatefulSet", "producer")["spec"]
    (container,) = producers["template"]["spec"]["containers"]
    told = parsed([word.replace("$(POD_INDEX)", str(producers["ordinals"]["start"])) for word in container["args"]])
    assert name_of(f"producer {told.producer}") == "producer 1" and told.tls == "/keys"
    assert [place.rpartition(":")[2] for place in (told.owner, told.client)] == [str(PORT), str(PORT)]
    for each in [*producers["template"]["spec"]["initContainers"], container]:
        assert each["securityContext"]["readOnlyRootFilesystem"] and each["securityContext"]["capabilities"]
    scaler = of(found, "HorizontalPodAutoscaler", "producer")["spec"]
    exported = exposed(ProducerMetrics())
    (metric,) = scaler["metrics"]
    assert metric["external"]["metric"]["name"] in exported and "replicas" not in producers
    dealer = {each["metadata"]["name"] for each in of_kind("StatefulSet", "dealer")}
    assert scaler["scaleTargetRef"]["name"] not in dealer


def exposed(metrics):
    return set(re.findall(r"^# TYPE (\w+)", generate_latest(metrics.registry).decode(), re.MULTILINE))


def test_a_keeper_exports_what_is_there_and_what_is_wanted():
    metrics = KeeperMetrics(lambda: {"8+4": 1}, lambda: {"8+4": 2}, lambda: 3)
    metrics.settled("0" * 16, 100)
    value = metrics.registry.get_sample_value
    assert value("crypten_llm_stock_blocks", {"shape": "8+4"}) == 1 and value("crypten_llm_stock_producers") == 3
    assert value("crypten_llm_stock_wanted_blocks", {"shape": "8+4"}) == 2
    assert value("crypten_llm_stock_delivered_bytes_total") == 100
    assert "crypten_llm_stock_blocks" in exposed(metrics)
