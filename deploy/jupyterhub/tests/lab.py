"""Starts everything of the loop for real: a registry, Redis, manager and agent, JupyterHub with its proxy."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

TREE = Path(__file__).resolve().parents[3]
PATIENCE_S = 120
PASSWORD = "a password for tests"


def port() -> int:
    """Returns a port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(what: str, look: Callable[[], Any]) -> Any:
    """Waits for a true value. Far longer than anything takes on a busy machine."""
    begun = time.monotonic()
    while True:
        found = look()
        if found:
            return found
        waited = time.monotonic() - begun
        if waited > PATIENCE_S:
            raise AssertionError(f"waited for: {what}")
        # Whoever is asked needs time, too.
        time.sleep(min(0.05 + waited / 20, 0.5))


def run(*words: str | Path, **more: Any) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def program() -> Path:
    """Returns upperdeck's program: that of the environment, or the newest build of this tree."""
    if given := os.environ.get("UPPERDECK_PROGRAM"):
        return Path(given)
    built = [TREE / "target" / profile / "upperdeck" for profile in ("debug", "release")]
    return max((path for path in built if path.exists()), key=lambda path: path.stat().st_mtime)


def base() -> str:
    """Returns the image of Debian with Python, which the tests of the program make once for a machine."""
    script = TREE / "tests/e2e/host/bases.sh"
    cache = Path("/var/tmp/upperdeck-test-bases")
    made = cache / f"big-{hashlib.sha256(script.read_bytes()).hexdigest()[:16]}"
    cache.mkdir(exist_ok=True)
    with (cache / "big.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "done").exists():
            shutil.rmtree(made, ignore_errors=True)
            run("bash", script, "big", made)
            (made / "done").touch()
    return f"oci:{made}/oci:latest"


class Daemon:
    """A process with a log, ended by its process group."""

    def __init__(self, words: list[str | Path], log: Path, **more: Any) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                start_new_session=True, **more,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            assert self.process.poll() is None, f"it has ended: {self.text()[-4000:]}"
            return re.search(pattern, self.text())

        found: re.Match[str] = until(f"{pattern} in {self.log}", look)
        return found

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        # A hub starts proxy and services in groups of their own; one that had to be killed leaves them.
        children = children_of(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        for child, begun in children.items():
            # Its number may be another process's by now.
            with contextlib.suppress(OSError):
                if stat(child)[19] == begun:
                    os.kill(child, 15)


def stat(process: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on: the parent is at 1, the time of the start at 19."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def children_of(parent: int) -> dict[int, str]:
    """Returns the processes that a process started and that run, with the times at which they began."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = stat(int(entry.name))
            if int(fields[1]) == parent:
                found[int(entry.name)] = fields[19]
    return found


class Lab:
    """Everything that one hub needs, with servers in Podman's containers. `close` ends it and leaves nothing."""

    engine_name = "podman"

    def __init__(self, bound: float = 60.0) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="upperdeck-hub-", dir="/var/tmp"))
        # In memory: engines wait until the disk has all files of an image, and these are many.
        run("mount", "-t", "tmpfs", "-o", "mode=0755,size=6g", "upperdeck-hub", self.directory)
        self.daemons: list[Daemon] = []
        self.bound = bound
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _daemon(self, name: str, words: list[str | Path], **more: Any) -> Daemon:
        daemon = Daemon(words, self.directory / f"{name}.log", **more)
        self.daemons.append(daemon)
        return daemon

    def _start(self) -> None:
        self._start_registry()
        self.image = self.push(base(), "bases/python:1")
        self._start_engine()
        self._start_redis()
        self._write_keys()
        self._start_manager()
        self._start_agent()
        self._start_hub()

    def write_wheel(self) -> Path:
        """Writes a package that a user can install without a network, and returns its directory."""
        directory = self.directory / "wheels"
        directory.mkdir(exist_ok=True)
        info = "greeting-1.0.dist-info"
        with zipfile.ZipFile(directory / "greeting-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("greeting.py", "WORDS = 'hello from a package'\n")
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", f"greeting.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
        return directory

    # --- the parts

    def _start_registry(self) -> None:
        storage = self.directory / "registry"
        self.registry_port = port()
        (self.directory / "registry.yml").write_text(
            f"version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {storage}}}, "
            f"delete: {{enabled: true}}}}\nhttp: {{addr: '127.0.0.1:{self.registry_port}'}}\n"
        )
        self.registry_host = f"127.0.0.1:{self.registry_port}"
        self.start_registry()

    def start_registry(self) -> None:
        self.registry = self._daemon("registry", ["docker-registry", "serve", self.directory / "registry.yml"])
        until("the registry", lambda: answers(f"http://{self.registry_host}/v2/"))

    def push(self, source: str, name: str) -> str:
        reference = f"{self.registry_host}/{name}"
        run(
            "skopeo",
            "copy",
            "--quiet",
            "--preserve-digests",
            "--dest-tls-verify=false",
            source,
            f"docker://{reference}",
        )
        return reference

    def _start_engine(self) -> None:
        here = self.directory / "podman"
        here.mkdir()
        (here / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n[engine]\nruntime = "runc"\n'
            'cgroup_manager = "cgroupfs"\nevents_logger = "none"\nlock_type = "file"\n'
            f'tmp_dir = "{here}/tmp"\n'
        )
        (here / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{here}/root"\nrunroot = "{here}/runroot"\n'
        )
        self.engine_environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(here),
            "CONTAINERS_CONF": str(here / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(here / "storage.conf"),
        }

    def engine(self, *words: str) -> str:
        """Runs a command of Podman or Docker."""
        return run(self.engine_name, *words, env=self.engine_environment)

    def _stores(self) -> dict[str, Path]:
        """Returns where the agent finds the engine's containers, by option; no other's."""
        nowhere = self.directory / "none"
        options = ("containerd-root", "containerd-state", "docker-root")
        podman = self.directory / "podman"
        return {
            **dict.fromkeys(options, nowhere),
            "storage-root": podman / "root",
            "storage-runroot": podman / "runroot",
        }

    def _start_redis(self) -> None:
        socket_file = self.directory / "redis.sock"
        self._daemon(
            "redis",
            ["redis-server", "--port", "0", "--unixsocket", socket_file, "--save", "", "--dir", self.directory],
        ).wait_for("[Rr]eady to accept|accept connections")
        self.redis = f"redis+unix://{socket_file}"

    def _write_keys(self) -> None:
        key = self.directory / "master-key"
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32) + "\n")
        run(program(), "key", "--node", "node-1", "--key-file", key, "--output", self.directory / "node-key")
        run(sys.executable, "-m", "jupyterhub_upperdeck", "key", self.directory / "hub-keys")

    def _start_manager(self) -> None:
        self.manager_port = port()
        self.manager_url = f"http://127.0.0.1:{self.manager_port}"
        self.target = f"{self.registry_host}/sessions/{{user}}/{{name}}:{{tag}}"
        self._daemon(
            "manager",
            [
                program(), "manager", "--redis", self.redis, "--key-file", self.directory / "master-key",
                "--listen", f"127.0.0.1:{self.manager_port}", "--record", f"sqlite:{self.directory}/manager.db",
                "--target", self.target, "--tls-verify=false", "--backoff", "2s", "--attempts", "20",
                "--jwks", self.directory / "hub-keys/jwks.json", "--jwt-issuer", "jupyterhub-upperdeck",
                "--jwt-audience", "upperdeck", "--jwt-groups-claim", "groups", "--administrator", "admin",
            ],
        )  # fmt: skip
        until("the manager", lambda: answers(f"{self.manager_url}/readyz"))

    def _start_agent(self) -> None:
        self._daemon(
            "agent",
            [
                program(), "agent", "--redis", self.redis, "--key-file", self.directory / "node-key",
                "--node", "node-1", "--owner", "env:UPPERDECK_OWNER", "--allow", f"{self.registry_host}/sessions",
                "--tls-verify=false", "--foreground",
                "--spool-dir", self.directory / "spool", "--state-dir", self.directory / "state",
                *[f"--{option}={place}" for option, place in self._stores().items()],
            ],
        )  # fmt: skip

    def _start_hub(self) -> None:
        venv = Path(sys.prefix)
        site = next((venv / "lib").glob("python3*/site-packages"))
        node = TREE / "target/jupyterhub/proxy/node_modules/configurable-http-proxy/bin/configurable-http-proxy"
        self.hub_port, self.service_port = port(), port()
        self.hub = f"http://127.0.0.1:{self.hub_port}"
        self.culler_token = secrets.token_hex(16)
        places = {
            "directory": str(self.directory),
            "hub_port": self.hub_port,
            "hub_api_port": port(),
            "service_port": self.service_port,
            "proxy_api_port": port(),
            "proxy_token": secrets.token_hex(16),
            "proxy": ["node", str(node)],
            "password": PASSWORD,
            "culler_token": self.culler_token,
            "image": self.image,
            "engine": self.engine_name,
            "engine_environment": self.engine_environment,
            # The programs of a Jupyter image; what the user installs goes into the image's own environment.
            "mounts": [str(venv), str(self.write_wheel())],
            "container_environment": {
                "PATH": f"/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:{venv}/bin",
                "HOME": "/home/researcher",
                "PYTHONPATH": str(site),
                "JUPYTER_PATH": f"{venv}/share/jupyter",
                "JUPYTER_CONFIG_PATH": f"{venv}/etc/jupyter",
                "JUPYTERLAB_DIR": f"{venv}/share/jupyter/lab",
                "SHELL": "/bin/bash",
            },
            "manager_url": self.manager_url,
            "signing_key": str(self.directory / "hub-keys/signing-key.pem"),
            "target": self.target,
            "bound": self.bound,
        }
        environment = {
            **os.environ,
            "LAB": json.dumps(places),
            "PYTHONPATH": str(Path(__file__).parent),
        }
        self.hub_process = self._daemon(
            "hub",
            [sys.executable, "-m", "jupyterhub", "-f", Path(__file__).with_name("hub_config.py")],
            cwd=self.directory,
            env=environment,
        )
        until("the hub", lambda: answers(f"{self.hub}/services/upperdeck/health") or self.hub_process.process.poll())
        assert self.hub_process.process.poll() is None, self.hub_process.text()[-4000:]

    def forget_images(self) -> None:
        """Removes all images of the node that no container uses, as on another node."""
        for image in set(self.engine("images", "--quiet").split()):
            self.engine("rmi", "--force", image)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        # What was started last may use what was started before.
        for daemon in reversed(self.daemons):
            if daemon.log.stem != self.engine_name:
                daemon.stop()
        if hasattr(self, "engine_environment"):
            self._remove_containers()
        for daemon in self.daemons:
            daemon.stop()
        if os.environ.get("UPPERDECK_KEEP_LAB") != "1":
            # With what engines leave mounted in it.
            run("umount", "--recursive", "--lazy", self.directory)
            self.directory.rmdir()

    def _remove_containers(self) -> None:
        words = ["podman", "rm", "--all", "--force", "--time", "1"]
        subprocess.run(words, env=self.engine_environment, capture_output=True, check=False)


class DockerLab(Lab):
    """The same with a Docker daemon of its own, and DockerSpawner."""

    engine_name = "docker"

    def _start_engine(self) -> None:
        here = self.directory / "docker"
        here.mkdir()
        # The machine's own settings have no effect.
        (here / "daemon.json").write_text("{}")
        self.engine_environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": f"unix://{here}/sock"}
        self._daemon(
            "docker",
            [
                "dockerd", "--storage-driver", "overlay2", "--bridge", "none", "--iptables=false",
                "--ip-forward=false", "--host", f"unix://{here}/sock", "--data-root", here / "root",
                "--exec-root", here / "exec", "--pidfile", here / "pid", "--config-file", here / "daemon.json",
            ],
        ).wait_for("API listen on")  # fmt: skip

    def _stores(self) -> dict[str, Path]:
        here = self.directory / "docker"
        # Docker's own containerd has the settings that a container was started with.
        return {
            **super()._stores(),
            "docker-root": here / "root",
            "containerd-root": here / "root/containerd/daemon",
            "containerd-state": here / "exec/containerd/daemon",
        }

    def _remove_containers(self) -> None:
        found = subprocess.run(
            ["docker", "ps", "--all", "--quiet"],
            env=self.engine_environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if containers := found.stdout.split():
            subprocess.run(["docker", "rm", "--force", *containers], env=self.engine_environment, check=False)


def answers(url: str) -> bool:
    try:
        return bool(requests.get(url, timeout=5).ok)
    except requests.RequestException:
        return False
