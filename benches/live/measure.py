"""One part of benches/live/run: saves, and prints tables. What the options mean is said there."""
import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time

parser = argparse.ArgumentParser(usage=__doc__)
for name in ["part", "upperdeck", "registry", "container", "docker", "nerdctl", "venv"]:
    parser.add_argument(f"--{name}")
for name in ["saves", "most", "pid", "docker-pid", "nerdctl-pid"]:
    parser.add_argument(f"--{name}", type=int)
for name in ["work", "writers"]:
    parser.add_argument(f"--{name}", type=pathlib.Path)
arguments = parser.parse_args()
root = pathlib.Path(f"/proc/{arguments.pid}/root")
state = arguments.work / "state"


def run(command):
    """Seconds, largest resident set in bytes, beginning and end by the monotonic clock."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended = time.monotonic()
    if status != 0:
        sys.exit(f"failed: {command}\n{said.decode(errors='replace')}")
    return ended - begun, usage.ru_maxrss * 1024, begun, ended


def gap(begun, ended, pid=None):
    """The longest time in between in which the session's process could not run, in ms."""
    time.sleep(0.05)
    gaps = pathlib.Path(f"/proc/{pid or arguments.pid}/root/dev/shm/gaps").read_text().splitlines()
    spans = [tuple(map(float, line.split())) for line in gaps]
    return 1000 * max((end - start for start, end in spans if end > begun and start < ended), default=0.0)


def save(*flags, to=None):
    """A save to the registry, or to a layout: what it says of itself, with seconds, memory and what the probe saw."""
    metadata = arguments.work / "metadata"
    destination = to or f"{arguments.registry}/live/session:1"
    command = [arguments.upperdeck, "commit", "--quiet", "--tls-verify=false", "--max-pause", "0", "--state-dir", state,
               "--metadata-file", metadata, *flags, arguments.container, destination]
    seconds, memory, begun, ended = run(command)
    saved = json.loads(metadata.read_text())
    return {**saved, "wall": seconds, "rss": memory, "probe": gap(begun, ended),
            "sent": sum(layer["size_bytes"] for layer in saved["layers"])}


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells):
    row(*cells)
    row("---", *["---:"] * (len(cells) - 1))


def pauses(name, saved, *more):
    pause = sorted(one["pause_ms"] for one in saved)
    apart = [one["probe"] - one["pause_ms"] for one in saved]
    row(name, len(pause), f"{statistics.median(pause):.0f}", f"{pause[-1]:.0f}",
        f"{statistics.median(one['probe'] for one in saved):.0f}", f"{statistics.median(apart):+.0f}",
        f"{statistics.median(one['wall'] for one in saved):.2f}", *more)


def entries():
    """Of the upper directory."""
    inspect = [arguments.upperdeck, "inspect", "--format", "json", arguments.container]
    inspected = subprocess.run(inspect, stdout=subprocess.PIPE, check=True, env={**os.environ, "UPPERDECK_STATE_DIR": str(state)})
    return json.loads(inspected.stdout)["upper"]["entries"]


def inside(*command):
    """Starts a process in the container, writing all the while."""
    return subprocess.Popen(["podman", "exec", "--user", "0", arguments.container, *command], stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end(processes):
    """Ends everything in the container but its first process."""
    def namespace(pid):
        try:
            return os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            # It has ended, or is not ours to look at.
            return None
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != arguments.pid and namespace(entry.name) == namespace(arguments.pid):
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    for process in processes:
        process.wait()


def part_pause():
    print(f"\nThe session, {entries()} entries\n")
    head("saves", "n", "median ms", "worst ms", "probe median ms", "probe less pause", "save s")
    pauses("everything, idle", [save("--full") for _ in range(5)])
    changed = root / arguments.venv / "changed"

    def idle():
        changed.write_text(str(time.time()))
        return save("--max-layers", "100")

    pauses("what changed, idle", [idle() for _ in range(arguments.saves)])
    (root / "opt/writers.py").write_bytes(arguments.writers.read_bytes())
    processes = [inside("python3", "/opt/writers.py", what) for what in ["tree", "database"]]
    time.sleep(3)
    pauses("what changed, two programs writing", [save("--max-layers", "100") for _ in range(arguments.saves)])
    pauses("everything, two programs writing", [save("--full") for _ in range(5)])
    end(processes)


def part_again():
    first = save()
    (root / arguments.venv / "changed").write_bytes(random.randbytes(1 << 20))
    time.sleep(1)
    second = save()
    nothing = save()
    again = []
    for _ in range(5):
        (root / arguments.venv / "changed").write_bytes(random.randbytes(1 << 20))
        time.sleep(0.3)
        again.append(save("--max-layers", "100"))
    wall = statistics.median([second["wall"], *(one["wall"] for one in again)])
    buildah = []
    for number in range(3):
        (root / arguments.venv / "changed").write_bytes(random.randbytes(1 << 20))
        command = ["buildah", "commit", "--quiet", "--tls-verify=false", arguments.container,
                   f"docker://{arguments.registry}/live/buildah:{number}"]
        buildah.append(run(command)[0])
    print(f"\nSaving again, {entries()} entries\n")
    head("save", "seconds", "layers sent", "bytes of layers", "of the first's time", "of its bytes", "of buildah's time")
    peer = statistics.median(buildah)
    for name, one, seconds in [("first", first, first["wall"]), ("after 1 MB", second, wall), ("after nothing", nothing, nothing["wall"])]:
        row(name, f"{seconds:.2f}", len(one["layers"]), one["sent"], f"1/{first['wall'] / seconds:.1f}",
            f"1/{first['sent'] / one['sent']:.0f}" if one["sent"] else "0", f"1/{peer / seconds:.1f}")
    row("buildah commit", f"{peer:.2f}", "", "", "", "", "")


def fill(directory, number):
    """Small files, 200 in a directory, as packages have them."""
    for at in range(number):
        where = directory / f"{at // 200:05}"
        if at % 200 == 0:
            where.mkdir(parents=True)
        (where / f"module_{at % 200}.py").write_bytes(b"x" * (at % 700))


def part_grow():
    print("\nBy the number of entries, idle\n")
    head("entries", "n", "pause of a first save, median ms", "worst ms", "of the next ones, median ms", "worst ms", "probe less pause",
         "first save s", "next save s")
    have = 0
    for number in [0, 100_000, 200_000, 500_000]:
        if number > arguments.most:
            break
        if number:
            fill(root / f"opt/many{number}", number - have)
            os.sync()
        have = number or entries()
        full = [save("--full", "--compression", "zstd", "--compression-level", "1") for _ in range(3)]
        next_ones = []
        for _ in range(7):
            (root / "opt/changed").write_text(str(time.time()))
            next_ones.append(save("--compression", "zstd", "--max-layers", "100"))
        median = lambda key, of: statistics.median(one[key] for one in of)
        apart = statistics.median(one["probe"] - one["pause_ms"] for one in full + next_ones)
        row(have, 10, f"{median('pause_ms', full):.0f}", f"{max(one['pause_ms'] for one in full):.0f}",
            f"{median('pause_ms', next_ones):.0f}", f"{max(one['pause_ms'] for one in next_ones):.0f}", f"{apart:+.0f}",
            f"{median('wall', full):.1f}", f"{median('wall', next_ones):.2f}")


def part_memory():
    fill(root / "opt/many", 1_000_000 - entries() - 5_000)
    first = save("--full", "--compression", "zstd", "--compression-level", "1")
    (root / "opt/changed").write_text(str(time.time()))
    second = save("--compression", "zstd")
    print(f"\nMemory, {entries()} entries\n")
    head("save", "largest resident set MiB", "pause ms", "seconds")
    for name, one in [("first, live", first), ("the next", second)]:
        row(name, one["rss"] >> 20, f"{one['pause_ms']:.0f}", f"{one['wall']:.1f}")


REWRITE = """
import os, random, time
file = os.open("/home/large", os.O_RDWR | os.O_CREAT)
for at in range(0, 2 << 30, 1 << 20):
    os.pwrite(file, os.urandom(1 << 20), at)
open("/home/ready", "w").close()
n, longest = 0, 0
while True:
    begun = time.monotonic()
    os.pwrite(file, os.urandom(4096), random.randrange((2 << 30) // 4096) * 4096)
    if time.monotonic() - begun > longest:
        longest = time.monotonic() - begun
        with open("/home/waited", "w") as waited:
            waited.write(str(longest))
    n += 1
    if PACE and n % (PACE // 100) == 0:
        time.sleep(0.01)
"""


def pieces(file):
    """Of a file, as it lies on disk."""
    said = subprocess.run(["filefrag", file], stdout=subprocess.PIPE, check=True).stdout.decode()
    return int(said.rsplit(":", 1)[1].split()[0])


def part_xfs():
    """One file at each pace, that every save clones: what is rewritten before the clone is gone lies in pieces of its own."""
    print("\nXFS, a file of 2 GB rewritten at random in blocks of 4 KiB\n")
    head("writes a second", "n", "median ms", "worst ms", "probe median ms", "probe less pause", "save s", "pieces before the last save",
         "longest wait of the file's writer, s")
    for pace in [2000, 0]:
        process = inside("python3", "-c", REWRITE.replace("PACE", str(pace)))
        while not (root / "home/ready").exists():
            time.sleep(0.1)
        saved = []
        for _ in range(arguments.saves):
            lies_in = pieces(root / "home/large")
            saved.append(save("--full", "--compression", "none", to=f"oci:{arguments.work}/images:1"))
            subprocess.run(["rm", "-rf", arguments.work / "images"])
        waited = float((root / "home/waited").read_text())
        end([process])
        subprocess.run(["rm", "-rf", root / "home/ready", root / "home/large", root / "home/waited"])
        pauses(pace or "as many as it can", saved, lies_in, f"{waited:.1f}")


def part_peers():
    print(f"\nThe same session, {entries()} entries, saved by others\n")
    head("tool", "stands still s", "seconds")
    for name, pid, command in [
        ("podman commit --pause", arguments.pid, ["podman", "commit", "--quiet", "--pause", arguments.container, "localhost/peer:1"]),
        ("docker commit", arguments.docker_pid, ["docker", "commit", arguments.docker, "peer:1"]),
        ("nerdctl commit", arguments.nerdctl_pid, ["nerdctl", "commit", arguments.nerdctl, "localhost/peer:1"]),
    ]:
        if not pid:
            continue
        seconds, _, begun, ended = run(command)
        row(name, f"{gap(begun, ended, pid) / 1000:.2f}", f"{seconds:.2f}")
    one = save("--full")
    row("upperdeck commit", f"{one['pause_ms'] / 1000:.3f}", f"{one['wall']:.2f}")


signal.signal(signal.SIGINT, signal.SIG_DFL)
globals()[f"part_{arguments.part}"]()
