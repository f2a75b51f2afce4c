"""Runs one save of one tool and notes what it took, as a line of JSON.

    measure.py --records FILE --round N --container NAME --tool NAME --registry-pid PID [--daemon PID]...
               [--probe GAPS] [--registry HOST --storage DIR --repository NAME --base-layers N | --size BYTES | --size-of FILE]
               -- STEP...

Every STEP is a shell command; they run one after the other. CPU seconds are those of the steps' processes and, for tools
that let a daemon work, what the daemon and its children used meanwhile. The layer's size is what the registry's manifest
says; a layer that was not uploaded in this very run is an error, since then a cache answered. The image is removed from
the registry afterwards. What everything else on the machine used of its cores meanwhile is noted too: with much of it the
figures are worth nothing.
"""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
TICK = os.sysconf("SC_CLK_TCK")


def cpu_of_tree(root):
    """CPU seconds of a process, of its living descendants, and of those they waited for."""
    parents, seconds = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name may hold spaces and parentheses; what follows it does not. See proc(5).
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(fields[1])
        seconds[int(entry.name)] = sum(map(int, fields[11:15])) / TICK
    total = 0.0
    for process in seconds:
        ancestor = process
        while ancestor not in (root, 0):
            ancestor = parents.get(ancestor, 0)
        total += seconds[process] if ancestor == root else 0.0
    return total


def cpu_of_machine():
    """CPU seconds of everything, and those that the hypervisor gave to others. See proc_stat(5)."""
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = (
        int(field) / TICK for field in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return user + nice + system + interrupts + soft_interrupts, stolen


def run(step):
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", step], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status != 0:
        sys.exit(f"failed: {step}\n{said.decode(errors='replace')}")
    return wall, usage


def pauses(probe, started, ended):
    """Lengths of the times between the two in which the container's process stood still."""
    # It notes a pause when it runs again.
    time.sleep(0.1)
    spans = [tuple(map(float, line.split())) for line in probe.read_text().splitlines()]
    return [end - start for start, end in spans if end > started and start < ended]


def layers(arguments, started):
    """Sizes of the layers beyond the base's, which must have been uploaded since `started`."""
    url = f"http://{arguments.registry}/v2/{arguments.repository}/manifests/1"
    request = urllib.request.Request(url, headers={"Accept": ", ".join(MANIFESTS)})
    with urllib.request.urlopen(request) as response:
        manifest = json.load(response)
    registry = arguments.storage / "docker/registry/v2"
    added = manifest["layers"][arguments.base_layers :]
    if not added:
        sys.exit(f"{arguments.tool}: the image has no layer beyond its base: {json.dumps(manifest)}")
    for descriptor in [*added, manifest["config"]]:
        hexadecimal = descriptor["digest"].split(":")[1]
        blob = registry / "blobs/sha256" / hexadecimal[:2] / hexadecimal
        if (blob / "data").stat().st_mtime < started - 0.1:
            sys.exit(f"{arguments.tool}: {descriptor['digest']} is older than this run: a cache answered for it")
        shutil.rmtree(blob)
    shutil.rmtree(registry / "repositories" / arguments.repository)
    return [descriptor["size"] for descriptor in added]


# An interrupt is the caller's to tell.
signal.signal(signal.SIGINT, signal.SIG_DFL)

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("--records", type=pathlib.Path, required=True)
parser.add_argument("--round", type=int, required=True)
parser.add_argument("--container", required=True)
parser.add_argument("--tool", required=True)
parser.add_argument("--daemon", type=int, action="append", default=[])
parser.add_argument("--registry")
parser.add_argument("--registry-pid", type=int, required=True)
parser.add_argument("--storage", type=pathlib.Path)
parser.add_argument("--repository")
parser.add_argument("--base-layers", type=int)
parser.add_argument("--probe", type=pathlib.Path)
parser.add_argument("--size", type=int)
parser.add_argument("--size-of", type=pathlib.Path)
parser.add_argument("steps", nargs="+")
arguments = parser.parse_args()

clock, started = time.time(), time.monotonic()
before = [cpu_of_tree(daemon) for daemon in arguments.daemon]
registry_before = cpu_of_tree(arguments.registry_pid)
busy_before, stolen_before = cpu_of_machine()
done = [run(step) for step in arguments.steps]
ended = time.monotonic()
busy, stolen = cpu_of_machine()
registry_cpu = cpu_of_tree(arguments.registry_pid) - registry_before
daemons = sum(cpu_of_tree(daemon) - was for daemon, was in zip(arguments.daemon, before))

record = {
    "round": arguments.round,
    "container": arguments.container,
    "tool": arguments.tool,
    "wall_s": sum(wall for wall, _ in done),
    "step_wall_s": [wall for wall, _ in done],
    "cpu_s": daemons + sum(usage.ru_utime + usage.ru_stime for _, usage in done),
    # Of the largest process of the steps; nothing of daemons.
    "peak_rss_bytes": max(usage.ru_maxrss for _, usage in done) * 1024,
}
record["registry_cpu_s"] = registry_cpu
record["others_cpu_s"] = max(0.0, busy - busy_before - record["cpu_s"] - registry_cpu)
record["stolen_cpu_s"] = stolen - stolen_before
if arguments.probe:
    stood_still = pauses(arguments.probe, started, ended)
    record["stood_still_s"] = sum(stood_still)
    record["longest_pause_s"] = max(stood_still, default=0.0)
if arguments.repository:
    sizes = layers(arguments, clock)
    record["layers"] = len(sizes)
    record["layer_bytes"] = sum(sizes)
elif arguments.size_of:
    record["layer_bytes"] = arguments.size_of.stat().st_size
else:
    record["layer_bytes"] = arguments.size

with arguments.records.open("a") as records:
    records.write(json.dumps(record) + "\n")
print(f"{record['wall_s']:8.2f} s  {record['cpu_s']:6.2f} CPU s  {record['layer_bytes'] / 1e6:7.2f} MB", file=sys.stderr)
