# A file system at TARGET that answers for its root, and for nothing in it but, where asked for, the file `f`, of which
# it never gives a byte. Says "up" when it is mounted, and "asked" when it keeps a reader waiting.
import ctypes, os, struct, sys

target = sys.argv[1]
with_file = sys.argv[2:] == ["file"]
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
if libc.mount(b"fuse", target.encode(), b"fuse", 6, options.encode()) != 0:
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
print("up", flush=True)


def attr(node):
    directory = node == 1
    mode, size = (0o40755, 0) if directory else (0o100666, 1 << 20)
    times = (0,) * 3
    return struct.pack("<6Q10I", node, size, 8, *times, 0, 0, 0, mode, 1 + directory, 0, 0, 0, 4096, 0)


while True:
    request = os.read(fd, 1 << 20)
    opcode, unique, node = struct.unpack_from("<4xIQQ", request)
    reply = None
    if opcode == 26:  # INIT
        minor = struct.unpack_from("<I", request, 44)[0]
        reply = struct.pack("<4I2H2I", 7, min(minor, 31), 65536, 0, 0, 0, 65536, 1).ljust(64, b"\0")
    elif opcode == 3 and (node == 1 or with_file):  # GETATTR
        reply = struct.pack("<QII", 1 << 30, 0, 0) + attr(node)
    elif opcode == 1 and with_file and request[40:] == b"f\0":  # LOOKUP
        reply = struct.pack("<4Q2I", 2, 0, 1 << 30, 1 << 30, 0, 0) + attr(2)
    elif opcode == 14 and with_file:  # OPEN
        reply = struct.pack("<Q2I", 1, 0, 0)
    elif opcode in (2, 42, 36):  # FORGET, BATCH_FORGET, INTERRUPT
        continue
    if reply is None:
        print("asked", flush=True)
        continue
    os.write(fd, struct.pack("<IiQ", 16 + len(reply), 0, unique) + reply)
