"""The files of deploy/ as data: command lines with what they are given, and Kubernetes' resources."""

import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from crypten_llm.roles import role_names

DEPLOY = Path(__file__).parents[1] / "deploy"
ROLES = role_names(2)
IMAGE = "crypten-llm"


@dataclass(frozen=True)
class Started:
    """A party as a file starts it. files: folders that it is given, by where they are; ports: that are open to it."""

    where: str
    role: str
    arguments: list[str]
    environment: dict[str, str]
    folders: set[str] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def of_compose() -> list[Started]:
    found = []
    for role, service in compose()["services"].items():
        if role in ROLES:
            folders = {volume.split(":")[1] for volume in service["volumes"]}
            ports = {int(port.rsplit(":")[-1]) for port in service.get("ports", [])}
            found.append(Started("compose", role, service["command"], service["environment"], folders, ports))
    return found


def units() -> dict[str, dict[str, list[str]]]:
    """By role, the settings of its unit, each with all its values."""
    found = {}
    for role in ROLES:
        settings: dict[str, list[str]] = {}
        for line in (DEPLOY / "systemd" / f"crypten-llm-{role}.service").read_text("utf-8").splitlines():
            if "=" in line and not line.startswith("#"):
                name, _, value = line.partition("=")
                settings.setdefault(name, []).append(value)
        found[role] = settings
    return found


def of_systemd() -> list[Started]:
    found = []
    for role, settings in units().items():
        environment = dict(word.split("=", 1) for line in settings["Environment"] for word in shlex.split(line))
        environment["RUNTIME_DIRECTORY"] = f"/run/{settings['RuntimeDirectory'][0]}"
        (line,) = settings["ExecStart"]
        words = [_expanded(word, environment) for word in shlex.split(line)]
        assert words[0] == "/opt/crypten-llm/bin/crypten-llm"
        found.append(Started("systemd", role, words[1:], environment, {environment["RUNTIME_DIRECTORY"]}))
    return found


def kustomization(role: str, layer: str) -> dict:
    return yaml.safe_load((DEPLOY / "kubernetes" / role / layer / "kustomization.yaml").read_text("utf-8"))


def resources(role: str, layer: str) -> list[dict]:
    """Of the files that the layer lists; those of the base only with the base."""
    folder = DEPLOY / "kubernetes" / role / layer
    files = [folder / name for name in kustomization(role, layer)["resources"] if not (folder / name).is_dir()]
    return [resource for file in files for resource in yaml.safe_load_all(file.read_text("utf-8"))]


def of_kind(kind: str, role: str, layer: str = "base") -> list[dict]:
    return [resource for resource in resources(role, layer) if resource["kind"] == kind]


def pod(role: str) -> dict:
    (found,) = of_kind("StatefulSet", role)
    return found["spec"]["template"]["spec"]


def of_kubernetes(index: int = 0) -> list[Started]:
    """The party of this group."""
    found = []
    for role in ROLES:
        (options,) = of_kind("ConfigMap", role)
        (container,) = pod(role)["containers"]
        environment: dict[str, str] = {}
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                assert source["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
                environment[variable["name"]] = str(index)
            elif source:
                assert source["configMapKeyRef"]["name"] == options["metadata"]["name"]
                environment[variable["name"]] = options["data"][source["configMapKeyRef"]["key"]]
            else:
                environment[variable["name"]] = _expanded(variable["value"], environment)
        words = [_expanded(word, environment) for word in container["args"]]
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        ports = {port["containerPort"] for port in container.get("ports", [])}
        found.append(Started("kubernetes", role, words, environment, folders, ports))
    return found


def _expanded(text: str, environment: dict[str, str]) -> str:
    """Of Kubernetes' $(NAME) and systemd's ${NAME}."""
    return re.sub(r"\$[({](\w+)[)}]", lambda named: environment[named[1]], text)


@cache
def started() -> list[Started]:
    return [*of_compose(), *of_systemd(), *of_kubernetes()]


def commands_in(text: str) -> list[list[str]]:
    """Words of every command of this project in a script or in a page's blocks of code, without what starts it."""
    text = text.replace("\\\n", " ").replace("$$", "$")
    begins = r"^\s*(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:crypten-llm|python -m crypten_llm) "
    lines = re.findall(begins + r"([^\n|>;]+)", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
