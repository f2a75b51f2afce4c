#!/usr/bin/python3
"""Unpacks one layer as a lower directory of an overlay mount, as a snapshotter does.

    lower.py LAYER DIR --prefix trusted|user [--shift N]

Whiteouts become what the kernel knows: a device 0:0, an opaque directory's xattr (by prefix). --shift adds to every owner,
as for a container in a user namespace whose root is that id on the host.
"""
import argparse
import os
import stat
import subprocess

parser = argparse.ArgumentParser()
parser.add_argument("layer")
parser.add_argument("dir", type=os.fsencode)
parser.add_argument("--prefix", required=True)
parser.add_argument("--shift", type=int, default=0)
arguments = parser.parse_args()

os.makedirs(arguments.dir)
subprocess.run(
    ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", arguments.layer, "-C", os.fsdecode(arguments.dir)],
    check=True,
)
for folder, directories, files in os.walk(arguments.dir, topdown=False):
    times = os.stat(folder)
    for name in files:
        path = os.path.join(folder, name)
        if name == b".wh..wh..opq":
            os.unlink(path)
            os.setxattr(folder, f"{arguments.prefix}.overlay.opaque", b"y")
        elif name.startswith(b".wh."):
            os.unlink(path)
            os.mknod(os.path.join(folder, name[4:]), stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))

if arguments.shift:
    done = set()
    for folder, directories, files in os.walk(arguments.dir):
        for name in [b"."] + directories + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if name == b"." and folder != arguments.dir or status.st_ino in done:
                continue
            done.add(status.st_ino)
            # chown takes away file capabilities, setuid and setgid.
            keep = {}
            if stat.S_ISREG(status.st_mode):
                keep = {key: os.getxattr(path, key) for key in os.listxattr(path) if key == "security.capability"}
            os.lchown(path, status.st_uid + arguments.shift, status.st_gid + arguments.shift)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(path, stat.S_IMODE(status.st_mode))
            for key, value in keep.items():
                os.setxattr(path, key, value)
