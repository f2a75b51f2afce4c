"""One write that stays in its middle until it is told to go on: WAY FILE SIZE. Prints `under way` then, waits for a line,
and prints `over` when the write has returned.

`buffered`, `direct` and `ring` write from memory whose second half is not there: the kernel asks for it in mid-write
(userfaultfd(2)); `ring` is a buffered write by io_uring, of which a worker thread of the kernel's does the most. `libaio`,
`io_uring` and `fixed` submit a direct write to a disk that is slow, and do not wait for anything; `fixed` with a file and
memory that are registered."""
import ctypes, fcntl, mmap, os, struct, sys, threading

way, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
flags = os.O_WRONLY | (0 if way in ("buffered", "ring") else os.O_DIRECT)
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


def stopped_in_the_middle(write):
    half = size // 2
    memory[:half] = b"n" * half
    faults = call(323, os.O_CLOEXEC)
    fcntl.ioctl(faults, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
    # Pages that are missing.
    fcntl.ioctl(faults, 0xC020AA00, struct.pack("QQQQ", address + half, half, 1, 0))

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


def pwrite():
    libc.pwrite.restype = ctypes.c_long
    done = 0
    while done < size:
        part = libc.pwrite(fd, ctypes.c_void_p(address + done), ctypes.c_size_t(size - done), ctypes.c_long(done))
        assert part > 0, os.strerror(ctypes.get_errno())
        done += part


class Ring:
    def __init__(self):
        parameters = ctypes.create_string_buffer(120)
        self.fd = call(425, 8, ctypes.addressof(parameters))
        self.submission = struct.unpack_from("10I", parameters.raw, 40)
        self.completion = struct.unpack_from("10I", parameters.raw, 80)
        self.queue = mmap.mmap(self.fd, 1 << 14, offset=0)
        self.entries = mmap.mmap(self.fd, 8 * 64, offset=0x10000000)
        self.asked = 0

    def ask(self, operation, flags, file, done):
        # struct io_uring_sqe
        entry = struct.pack("<BBHiQQIIQ24x", operation, flags, 0, file, done, address + done, size - done, 0, 7)
        at = self.asked % 8
        self.entries[64 * at:64 * at + 64] = entry
        _, tail, _, _, _, _, array = self.submission[:7]
        struct.pack_into("I", self.queue, array + 4 * at, at)
        self.asked += 1
        struct.pack_into("I", self.queue, tail, self.asked)
        assert call(426, self.fd, 1, 0, 0, 0, 0) == 1

    def answer(self):
        call(426, self.fd, 0, 1, 1, 0, 0)
        head, = struct.unpack_from("I", self.queue, self.completion[0])
        at = self.completion[5] + 16 * (head % 16)
        struct.pack_into("I", self.queue, self.completion[0], head + 1)
        seven, done = struct.unpack_from("<Qi", self.queue, at)
        assert seven == 7 and done > 0, os.strerror(-done)
        return done


WRITE, WRITE_FIXED, FIXED_FILE = 23, 5, 1


def ring():
    asked, done = Ring(), 0
    while done < size:
        asked.ask(WRITE, 0, fd, done)
        done += asked.answer()


def io_uring(fixed):
    memory[:] = b"n" * size
    asked = Ring()
    if fixed:
        # IORING_REGISTER_BUFFERS, IORING_REGISTER_FILES
        vector, file = ctypes.create_string_buffer(struct.pack("QQ", address, size)), ctypes.c_int(fd)
        call(427, asked.fd, 0, ctypes.addressof(vector), 1)
        call(427, asked.fd, 2, ctypes.addressof(file), 1)
        os.close(fd)
        asked.ask(WRITE_FIXED, FIXED_FILE, 0, 0)
    else:
        asked.ask(WRITE, 0, fd, 0)
        os.close(fd)
    say("under way")
    assert asked.answer() == size


{
    "buffered": lambda: stopped_in_the_middle(pwrite),
    "direct": lambda: stopped_in_the_middle(pwrite),
    "ring": lambda: stopped_in_the_middle(ring),
    "libaio": libaio,
    "io_uring": lambda: io_uring(False),
    "fixed": lambda: io_uring(True),
}[way]()
say("over")
