"""One write that stays in its middle until it is told to go on: WAY FILE SIZE. Prints `under way` then, waits for a line,
and prints `over` when the write has returned.

`buffered` and `direct` write from memory whose second half is not there: the kernel asks for it in mid-write
(userfaultfd(2)). `libaio` and `io_uring` submit a direct write to a disk that is slow, and do not wait for anything."""
import ctypes, fcntl, mmap, os, struct, sys, threading

way, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
flags = os.O_WRONLY | (0 if way == "buffered" else os.O_DIRECT)
fd = os.open(path, flags)
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))


def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(argument) for argument in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def say(what):
    print(what, flush=True)


def stopped_in_the_middle():
    half = size // 2
    memory[:half] = b"n" * half
    faults = call(323, os.O_CLOEXEC)
    fcntl.ioctl(faults, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
    # Pages that are missing.
    fcntl.ioctl(faults, 0xC020AA00, struct.pack("QQQQ", address + half, half, 1, 0))

    def write():
        done = 0
        while done < size:
            part = libc.pwrite(fd, ctypes.c_void_p(address + done), ctypes.c_size_t(size - done), ctypes.c_long(done))
            assert part > 0, os.strerror(ctypes.get_errno())
            done += part

    libc.pwrite.restype = ctypes.c_long
    writer = threading.Thread(target=write)
    writer.start()
    os.read(faults, 32)
    say("under way")
    sys.stdin.readline()
    rest = mmap.mmap(-1, half)
    rest[:] = b"n" * half
    source = ctypes.addressof(ctypes.c_char.from_buffer(rest))
    fcntl.ioctl(faults, 0xC028AA03, struct.pack("QQQQq", address + half, source, half, 0, 0))
    writer.join()


def libaio():
    memory[:] = b"n" * size
    context = ctypes.c_ulong()
    call(206, 8, ctypes.addressof(context))
    # struct iocb: IOCB_CMD_PWRITE.
    block = ctypes.create_string_buffer(struct.pack("<QIIHhIQQqQII", 1, 0, 0, 1, 0, fd, address, size, 0, 0, 0, 0))
    blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    assert call(209, context.value, 1, ctypes.addressof(blocks)) == 1
    # The request counts, not the descriptor.
    os.close(fd)
    say("under way")
    event = ctypes.create_string_buffer(32)
    assert call(208, context.value, 1, 1, ctypes.addressof(event), 0) == 1
    assert struct.unpack("<QQqq", event.raw)[2] == size


def io_uring():
    memory[:] = b"n" * size
    parameters = ctypes.create_string_buffer(120)
    ring = call(425, 8, ctypes.addressof(parameters))
    submission = struct.unpack_from("10I", parameters.raw, 40)
    completion = struct.unpack_from("10I", parameters.raw, 80)
    queue = mmap.mmap(ring, 1 << 14, offset=0)
    entries = mmap.mmap(ring, 8 * 64, offset=0x10000000)
    # struct io_uring_sqe: IORING_OP_WRITE.
    entries[:64] = struct.pack("<BBHiQQIIQ24x", 23, 0, 0, fd, 0, address, size, 0, 7)
    _, tail, _, _, _, _, array = submission[:7]
    struct.pack_into("I", queue, array, 0)
    struct.pack_into("I", queue, tail, 1)
    assert call(426, ring, 1, 0, 0, 0, 0) == 1
    os.close(fd)
    say("under way")
    call(426, ring, 0, 1, 1, 0, 0)
    entries_at = completion[5]
    assert struct.unpack_from("<Qi", queue, entries_at) == (7, size)


{"buffered": stopped_in_the_middle, "direct": stopped_in_the_middle, "libaio": libaio, "io_uring": io_uring}[way]()
say("over")
