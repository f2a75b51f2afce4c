#!/usr/bin/env python3
"""Deletes pods of an installed chart at random while saves run, and looks at what became of every accepted save.

    deletions.py --namespace upperdeck --registry http://REGISTRY --session-image IMAGE --seconds 1200 [--seed N]
                 [--restart 'containerd=systemctl restart containerd'] [--restart 'kubelet=systemctl restart kubelet']

It runs on the cluster's only node, as root, with kubectl and the chart's token Secret. Each session writes a counter to two
files, one after the other, and to a file that is named by it. An image is right if its digest is the one that was told,
its blobs are what their digests say, and the counters are of one instant. A save that fails has to say that its session is
gone, and then that container does not run. At the end, nothing is frozen. Exit code 1: something was wrong.
"""

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# Longer than a save, its retries and a pod that starts again take.
PATIENCE = 240
SESSIONS = 3
POD = """apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: deletions}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: session
      image: %s
      command:
        - sh
        - -c
        - |
          mkdir -p /home/user; cd /home/user; i=0
          while true; do
            i=$((i + 1)); echo $i > first; echo $i > second; echo $i > n$i; rm -f n$((i - 1))
            if [ $((i %% 20)) = 0 ]; then dd if=/dev/urandom of=big bs=1M count=4 2> /dev/null; sleep 0.2; fi
          done
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespace", default="upperdeck")
    parser.add_argument("--release", default="upperdeck")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--session-image", required=True)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--restart", action="append", default=[], metavar="NAME=COMMAND")
    return parser.parse_args()


class Cluster:
    def __init__(self, options):
        self.options = options
        encoded = self.kubectl("get", "secret", options.release + "-token", "-o", "go-template={{.data.token | base64decode}}")
        self.token = encoded.strip()

    def kubectl(self, *args, stdin=None):
        command = ["kubectl", "-n", self.options.namespace, *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        return done.stdout

    def component(self, name):
        return "app.kubernetes.io/instance=%s,app.kubernetes.io/component=%s" % (self.options.release, name)

    def manager(self):
        """The address of a manager that is ready; None while there is none."""
        pods = self.kubectl("get", "pod", "-l", self.component("manager"), "-o", "json")
        for pod in json.loads(pods or '{"items": []}')["items"]:
            conditions = pod["status"].get("conditions", [])
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
            if ready and "deletionTimestamp" not in pod["metadata"]:
                return "http://%s:8787" % pod["status"]["podIP"]
        return None

    def call(self, path, body=None):
        """An answer of the API, for which a manager is waited for."""
        until = time.monotonic() + PATIENCE
        headers = {"Authorization": "Bearer " + self.token, "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        while time.monotonic() < until:
            at = self.manager()
            try:
                if at:
                    request = urllib.request.Request(at + path, headers=headers, data=data)
                    return json.load(urllib.request.urlopen(request, timeout=10))
            except urllib.error.HTTPError as error:
                if error.code not in (429, 502, 503):
                    return {"refused": error.read().decode()}
            except OSError:
                pass
            time.sleep(0.5)
        sys.exit("no manager answers")

    def start_sessions(self):
        """Makes sure that all sessions run. One that is being deleted has to be gone before it can be made again."""
        until = time.monotonic() + PATIENCE
        for name in ("s%d" % number for number in range(SESSIONS)):
            while time.monotonic() < until:
                pod = self.kubectl("get", "pod", name, "--ignore-not-found", "-o", "json")
                if pod and "deletionTimestamp" not in json.loads(pod)["metadata"]:
                    break
                if not pod:
                    self.kubectl("apply", "-f", "-", stdin=POD % (name, self.options.session_image))
                time.sleep(0.2)
        self.kubectl("wait", "--for=condition=Ready", "pod", "-l", "app=deletions", "--timeout=60s")

    def running(self):
        """The IDs of the sessions' containers that run and are not being deleted."""
        found = set()
        for pod in json.loads(self.kubectl("get", "pod", "-l", "app=deletions", "-o", "json"))["items"]:
            for container in pod["status"].get("containerStatuses", []):
                if "running" in container["state"] and "deletionTimestamp" not in pod["metadata"]:
                    found.add(container["containerID"].split("//")[1])
        return found

    def submit(self, number, tag):
        session = {"namespace": self.options.namespace, "pod": "s%d" % number, "container": "session"}
        # A session is known some seconds after its start.
        for _ in range(60):
            save = self.call("/api/v1/saves", {"session": session, "image": {"name": "s%d" % number, "tag": tag}})
            if "id" in save:
                return save["id"]
            time.sleep(0.5)
        sys.exit("a save is refused: %s" % save)

    def drain(self):
        node = self.kubectl("get", "node", "-o", "name").split()[0].removeprefix("node/")
        self.kubectl("drain", node, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--pod-selector=app=deletions", "--timeout=30s")
        self.kubectl("uncordon", node)


def fetch(url, accept="*/*"):
    request = urllib.request.Request(url, headers={"Accept": accept})
    return urllib.request.urlopen(request, timeout=30).read()


def digest(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def files(registry, repository, tag, expected):
    """The regular files of an image; fails if it is not the one that was told."""
    base = "%s/v2/%s" % (registry, repository)
    manifest = fetch("%s/manifests/%s" % (base, tag), MANIFEST)
    assert digest(manifest) == expected, "the tag names another image"
    found = {}
    for layer in json.loads(manifest)["layers"]:
        blob = fetch("%s/blobs/%s" % (base, layer["digest"]))
        assert digest(blob) == layer["digest"], "a blob differs from its digest"
        with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                directory, name = os.path.split(path)
                if name == ".wh..wh..opq":
                    found = {p: c for p, c in found.items() if not p.startswith(directory + "/")}
                elif name.startswith(".wh."):
                    found.pop(os.path.join(directory, name[4:]), None)
                elif member.isfile():
                    found[path] = archive.extractfile(member).read()
    return found


def one_instant(found):
    """Whether the counters were written by one run of the session's loop. A shell empties a file before it writes."""
    inside = {p.removeprefix("home/user/"): c for p, c in found.items() if p.startswith("home/user/")}
    counters = [int(inside[name]) for name in ("first", "second") if inside.get(name, b"").strip()]
    named = [int(name[1:]) for name in inside if name.startswith("n")]
    if len(counters) == 2 and counters[0] - counters[1] not in (0, 1):
        return False
    top = max(counters, default=0)
    return len(named) <= 2 and all(top - 2 <= n <= top + 1 for n in named)


def frozen():
    """The cgroups of pods that stand still."""
    found = set()
    for directory, _, names in os.walk("/sys/fs/cgroup"):
        for name, word in (("freezer.state", "FROZEN"), ("cgroup.events", "frozen 1")):
            if name in names and "kubepods" in directory:
                try:
                    with open(os.path.join(directory, name), encoding="utf-8") as file:
                        if word in file.read():
                            found.add(directory)
                except OSError:
                    pass
    return found


def actions(cluster, options):
    delete = lambda *args: cluster.kubectl("delete", "pod", "--wait=false", *args)
    agent, manager = cluster.component("agent"), cluster.component("manager")
    weighted = [
        (4, "agent pod killed", lambda: delete("-l", agent, "--force", "--grace-period=0")),
        (2, "agent pod deleted", lambda: delete("-l", agent)),
        (4, "manager pod deleted", lambda: delete("-l", manager, "--grace-period=1")),
        (4, "session pod deleted", lambda: delete("s%d" % random.randrange(SESSIONS))),
        (1, "drain", cluster.drain),
    ]
    for given in options.restart:
        name, command = given.split("=", 1)
        weighted.append((1, name + " restarted", lambda command=command: subprocess.run(command, shell=True, check=True)))
    return [(name, act) for weight, name, act in weighted for _ in range(weight)]


def follow(cluster, save):
    until = time.monotonic() + PATIENCE
    while True:
        state = cluster.call("/api/v1/saves/" + save)
        if state.get("state") in ("succeeded", "failed", "cancelled") or time.monotonic() > until:
            return state
        time.sleep(0.4)


def judge(cluster, state):
    """What is wrong with a save; None if nothing is. A session that was deleted is listed until an agent says otherwise."""
    options = cluster.options
    if state["state"] == "succeeded":
        try:
            repository, tag = state["target"].split("/", 1)[1].rsplit(":", 1)
            found = files(options.registry, repository, tag, state["result"]["digest"])
            return None if one_instant(found) else "not of one instant"
        except (AssertionError, OSError, tarfile.TarError) as error:
            return repr(error)
    if state["state"] == "failed" and state["error"]["code"] == "container_gone":
        return "its container runs" if state["session"] in cluster.running() else None
    return json.dumps(state.get("error") or state["state"])


def main():
    options = arguments()
    random.seed(options.seed)
    cluster = Cluster(options)
    choices = actions(cluster, options)
    done, ends, wrong, rounds = {}, {}, [], 0
    over = time.monotonic() + options.seconds
    while time.monotonic() < over:
        rounds += 1
        cluster.start_sessions()
        tag = "r%d-%d-%d" % (options.seed, int(time.time()), rounds)
        saves = [cluster.submit(number, tag) for number in range(SESSIONS)]
        time.sleep(random.choice([0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2]))
        name, act = random.choice(choices)
        act()
        done[name] = done.get(name, 0) + 1
        for save in saves:
            state = follow(cluster, save)
            end = " ".join([state["state"], (state.get("error") or {}).get("code", "")]).strip()
            ends[end] = ends.get(end, 0) + 1
            problem = judge(cluster, state)
            if problem:
                wrong.append([rounds, name, save, problem])
        stopped = frozen()
        if stopped:
            # A save or an inspection of this moment may freeze: what stands still for long does not end by itself.
            time.sleep(10)
            wrong += [[rounds, name, "frozen", cgroup] for cgroup in stopped & frozen()]
        print(time.strftime("%T"), rounds, name, ends, "wrong: %d" % len(wrong), flush=True)
    print(json.dumps({"rounds": rounds, "actions": done, "ends": ends, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
