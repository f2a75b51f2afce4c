"""One call that changes a file in many pieces, on a disk whose reads are slow: `prepare WAY FILE` makes the file, `WAY FILE` makes
the call. Prints `under way` right before it and `over` after it."""
import ctypes, fcntl, os, sys

way, path = sys.argv[-2:]
# Copying reads each of them.
BLOCK, BLOCKS = 4096, 128 if way == "copy" else 4096
size = BLOCK * BLOCKS
libc = ctypes.CDLL(None, use_errno=True)


def fragmented(path, byte):
    """Every other block of a file: each is an extent of its own, so the list of them fills many blocks of the disk."""
    with open(path, "wb") as file:
        for block in range(0, BLOCKS, 2):
            os.pwrite(file.fileno(), byte * BLOCK, block * BLOCK)
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())


def fallocate(mode, start, length):
    if libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def copy():
    done = 0
    while done < size:
        done += os.copy_file_range(source, fd, size - done, done, done)


if sys.argv[1] == "prepare":
    fragmented(path, b"o")
    fragmented(path + ".source", b"n")
    sys.exit()

fd = os.open(path, os.O_RDWR)
source = os.open(path + ".source", os.O_RDONLY)
calls = {
    "punch": lambda: fallocate(0x3, 0, size),
    "zero": lambda: fallocate(0x10, 0, size),
    "collapse": lambda: fallocate(0x8, 0, size // 2),
    "insert": lambda: fallocate(0x20, 0, size // 2),
    "truncate": lambda: os.ftruncate(fd, BLOCK),
    "clone": lambda: fcntl.ioctl(fd, 0x40049409, source),
    "copy": copy,
}
print("under way", flush=True)
calls[way]()
print("over", flush=True)
