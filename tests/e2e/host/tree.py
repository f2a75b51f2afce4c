#!/usr/bin/python3
"""Compares two directory trees entry by entry. Knows nothing of the program under test: no code is shared with it.

    tree.py A B [--except GLOB]... [--except-mtime GLOB]... [--shift N]

Looked at: type, mode, owner, size, whole seconds of the mtime, content, link target, device numbers, extended attributes,
and which names are links of one file. GLOBs match whole paths without a leading slash ("*" matches "/" too; "." is the
root). Prints what differs, at most 50 lines, then a count; exits 1 where anything does. Does not enter mounts, so
what is mounted inside it is left out: what is compared is the root file system alone.
"""
import argparse
import collections
import fnmatch
import hashlib
import json
import os
import stat
import sys

# The host's, not the container's: no image carries these.
FOREIGN = ("trusted.", "security.selinux", "security.ima", "security.evm", "system.nfs4_acl")
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "character device", stat.S_IFBLK: "block device", stat.S_IFSOCK: "socket",
}


def look(root, shift=0):
    """{path: {what: value}}; paths are bytes relative to the root. `shift` is taken off owners."""
    entries, links = {}, collections.defaultdict(list)
    mounts = mount_points(root)

    def entry(path, name):
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        seen = {
            "type": KINDS[kind],
            "mode": oct(stat.S_IMODE(status.st_mode)),
            "owner": f"{status.st_uid - shift}:{status.st_gid - shift}",
            "mtime": int(status.st_mtime_ns // 1_000_000_000),
            "xattrs": {
                key: attribute(path, key, shift)
                for key in sorted(os.listxattr(path, follow_symlinks=False))
                if not key.startswith(FOREIGN)
            },
        }
        if kind == stat.S_IFREG:
            seen["size"] = status.st_size
            seen["content"] = content(path)
        elif kind == stat.S_IFLNK:
            seen["target"] = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            seen["device"] = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            links[status.st_dev, status.st_ino].append(name)
        entries[name] = seen
        return kind == stat.S_IFDIR

    def walk(path, name):
        for child in sorted(os.listdir(path)):
            below = os.path.join(path, child)
            inside = child if name == b"." else name + b"/" + child
            if below in mounts:
                continue
            if entry(below, inside):
                walk(below, inside)

    sys.setrecursionlimit(100_000)
    entry(root, b".")
    walk(root, b".")
    for names in links.values():
        if len(names) > 1:
            for name in names:
                entries[name]["links"] = [printable(other) for other in sorted(names)]
    return entries


def attribute(path, key, shift):
    value = os.getxattr(path, key, follow_symlinks=False)
    # A file capability of the root of a user namespace: seen from outside it names that root, from inside it does not.
    if key == "security.capability" and shift and value[3] == 3 and value[20:] == shift.to_bytes(4, "little"):
        value = value[:3] + b"\x02" + value[4:20]
    return value.hex()


def content(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def mount_points(root):
    """Everything mounted below the root, in this mount namespace."""
    root = os.path.realpath(root)
    with open("/proc/self/mountinfo", "rb") as table:
        points = [line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in table]
    return {point for point in points if point.startswith(root.rstrip(b"/") + b"/")}


def printable(name):
    return name.decode("utf-8", "backslashreplace")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("a", type=os.fsencode)
    parser.add_argument("b", type=os.fsencode)
    parser.add_argument("--except", dest="excepted", action="append", default=[])
    parser.add_argument("--except-mtime", dest="no_mtime", action="append", default=[])
    parser.add_argument("--shift", type=int, default=0, help="what A's owners are above B's")
    parser.add_argument("--at-least", type=int, default=1, help="entries that A must have, lest nothing be compared")
    arguments = parser.parse_args()
    a, b = look(os.path.realpath(arguments.a), arguments.shift), look(os.path.realpath(arguments.b))
    if len(a) < arguments.at_least:
        sys.exit(f"{printable(arguments.a)} has only {len(a)} entries")

    def matches(name, globs):
        return any(fnmatch.fnmatchcase(printable(name), glob) for glob in globs)

    differences = []
    for name in sorted(a.keys() | b.keys()):
        if matches(name, arguments.excepted):
            continue
        if name not in b:
            differences.append(f"- {printable(name)} ({a[name]['type']}): only in the first")
        elif name not in a:
            differences.append(f"+ {printable(name)} ({b[name]['type']}): only in the second")
        else:
            keys = sorted(a[name].keys() | b[name].keys())
            unlike = {
                key: [a[name].get(key), b[name].get(key)]
                for key in keys
                if a[name].get(key) != b[name].get(key) and not (key == "mtime" and matches(name, arguments.no_mtime))
            }
            if unlike:
                differences.append(f"~ {printable(name)}: {json.dumps(unlike, default=printable)}")
    for line in differences[:50]:
        print(line)
    print(f"{len(a)} and {len(b)} entries compared, {len(differences)} differ")
    sys.exit(1 if differences else 0)


main()
