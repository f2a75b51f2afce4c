"""Programs that write hard and in an order that an instant cannot break: run in a container, checked by instant.py."""
import base64, ctypes, fcntl, hashlib, mmap, os, random, shutil, sqlite3, struct, subprocess, sys, time, zipfile

home = "/home/w"
what = sys.argv[1]
os.makedirs(home, exist_ok=True)


def counters():
    """n goes to a file, a mapping, another mapping, a log, a name, and a file again: each is n or n - 1, in that order."""
    first = os.open(f"{home}/first", os.O_RDWR | os.O_CREAT)
    last = os.open(f"{home}/last", os.O_RDWR | os.O_CREAT)
    maps = []
    for name in ["map1", "map2"]:
        fd = os.open(f"{home}/{name}", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 1 << 20)
        maps.append(mmap.mmap(fd, 1 << 20))
    log = open(f"{home}/log", "ab", buffering=0)
    os.makedirs(f"{home}/names", exist_ok=True)
    open(f"{home}/names/0", "w").close()
    n = 0
    while True:
        n += 1
        text = b"%016d" % n
        os.pwrite(first, text, 0)
        # The same page each time, dirty for as long as the kernel leaves it so; and one far away.
        maps[0][4096:4112] = text
        maps[1][500000:500016] = text
        log.write(text + b"\n")
        # Begun anew before it takes longer to read than all else.
        if n % 200_000 == 0:
            log.truncate(0)
        os.rename(f"{home}/names/{n - 1}", f"{home}/names/{n}")
        os.pwrite(last, text, 0)


def database():
    """Two tables that a transaction changes together."""
    db = sqlite3.connect(f"{home}/db", isolation_level=None)
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = off")
    db.execute("pragma wal_autocheckpoint = 50")
    for table in ["a", "b"]:
        db.execute(f"create table if not exists {table} (n integer primary key, t text)")
    n = 0
    while True:
        n += 1
        db.execute("begin")
        for table in ["a", "b"]:
            db.execute(f"insert or replace into {table} values (?, ?)", (n % 500, "x" * (n % 3000)))
        db.execute("commit")


def tree():
    """Files that come and go in order: those that are there are a run of numbers, each with its own content."""
    os.makedirs(f"{home}/tree", exist_ok=True)
    name = lambda n: f"{home}/tree/{n // 50 % 40}/{n}"
    n = 0
    while True:
        n += 1
        os.makedirs(os.path.dirname(name(n)), exist_ok=True)
        with open(name(n) + ".part", "w") as file:
            file.write(str(n) * 200)
        os.rename(name(n) + ".part", name(n))
        if n > 1000:
            os.remove(name(n - 1000))
            if (n - 1000) % 50 == 49:
                os.rmdir(os.path.dirname(name(n - 1000)))


def pages():
    """Two large files in which the same pages are rewritten at random, one after the other: they differ in one at most."""
    size = 64 << 20
    files = [os.open(f"{home}/pages{k}", os.O_RDWR | os.O_CREAT) for k in (1, 2)]
    for file in files:
        for at in range(0, size, 1 << 20):
            os.pwrite(file, b"0" * (1 << 20), at)
    open(f"{home}/pages", "w").close()
    n = 0
    while True:
        n += 1
        at = random.randrange(size // 4096) * 4096
        for file in files:
            os.pwrite(file, b"%016d" % n, at)


def page():
    """One page of a mapping, and nothing else: while it is dirty nothing moves the file's time stamps."""
    fd = os.open(f"{home}/page", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    shared = mmap.mmap(fd, 1 << 20)
    n = 0
    while True:
        n += 1
        shared[4096:4112] = b"%016d" % n


def rewrite(way):
    """A file of 16 MB that is rewritten in place by one call, every now and then: all of it is of one number, at any instant."""
    size = 16 << 20
    path = f"{home}/rewrite-{way}"
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def call(number, *arguments):
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(argument) for argument in arguments])
        if result < 0:
            raise OSError(ctypes.get_errno(), f"system call {number}")
        return result

    def wait(number, *arguments):
        """What waits is interrupted by a freeze."""
        while True:
            try:
                return call(number, *arguments)
            except InterruptedError:
                pass

    def fill(n):
        memory[:] = (b"%016d" % n) * (size // 16)

    def write(fd):
        assert os.pwrite(fd, memory, 0) == size

    fill(0)
    with open(path + ".new", "wb") as file:
        file.write(memory)
        os.fsync(file.fileno())
    direct = os.O_DIRECT if way in ("direct", "libaio", "io_uring") else 0
    fd = os.open(path + ".new", os.O_RDWR | direct)
    shared = mmap.mmap(fd, size) if way == "mmap" else None
    if way == "libaio":
        context = ctypes.c_ulong()
        call(206, 8, ctypes.addressof(context))
        request = ctypes.create_string_buffer(struct.pack("<QIIHhIQQqQII", 1, 0, 0, 1, 0, fd, address, size, 0, 0, 0, 0))
        requests = (ctypes.c_void_p * 1)(ctypes.addressof(request))
        event = ctypes.create_string_buffer(32)
    if way == "io_uring":
        parameters = ctypes.create_string_buffer(120)
        ring = call(425, 8, ctypes.addressof(parameters))
        submission, completion = (struct.unpack_from("10I", parameters.raw, at) for at in (40, 80))
        queue, entries = mmap.mmap(ring, 1 << 14), mmap.mmap(ring, 8 * 64, offset=0x10000000)
        entries[:64] = struct.pack("<BBHiQQIIQ24x", 23, 0, 0, fd, 0, address, size, 0, 7)
        struct.pack_into("I", queue, submission[6], 0)
    if way == "clone":
        source = os.open(path + ".source", os.O_RDWR | os.O_CREAT)
    os.rename(path + ".new", path)
    n = 0
    while True:
        n += 1
        fill(n)
        if way in ("buffered", "direct"):
            write(fd)
        elif way == "libaio":
            call(209, context.value, 1, ctypes.addressof(requests))
            wait(208, context.value, 1, 1, ctypes.addressof(event), 0)
        elif way == "io_uring":
            tail, = struct.unpack_from("I", queue, submission[1])
            struct.pack_into("I", queue, submission[6] + 4 * (tail % 8), 0)
            struct.pack_into("I", queue, submission[1], tail + 1)
            assert call(426, ring, 1, 0, 0, 0, 0) == 1
            wait(426, ring, 0, 1, 1, 0, 0)
            head, = struct.unpack_from("I", queue, completion[0])
            struct.pack_into("I", queue, completion[0], head + 1)
        elif way == "mmap":
            for at in range(0, size, 4096):
                shared[at:at + 4096] = memory[at:at + 4096]
        elif way == "rename":
            with open(path + ".part", "wb") as file:
                file.write(memory)
            os.rename(path + ".part", path)
        elif way == "truncate":
            os.ftruncate(fd, 0)
            write(fd)
        elif way == "zero":
            # FALLOC_FL_ZERO_RANGE
            call(285, fd, 0x10, 0, size)
            write(fd)
        elif way == "punch":
            # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            call(285, fd, 0x3, 0, size)
            write(fd)
        elif way == "clone":
            write(source)
            fcntl.ioctl(fd, 0x40049409, source)
        time.sleep(random.random() * 2)


def done(marker, n):
    with open(f"{home}/{marker}.part", "w") as file:
        file.write(str(n))
    os.rename(f"{home}/{marker}.part", f"{home}/{marker}")


def wheel(n):
    """A package of 300 modules."""
    path = f"{home}/wheels/swing_{n}-1-py3-none-any.whl"
    files = {f"swing_{n}/m{at}.py": f"# {n} {at}\n" * (at % 90) for at in range(300)}
    files[f"swing_{n}-1.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: swing-{n}\nVersion: 1\n"
    files[f"swing_{n}-1.dist-info/WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digest = lambda text: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    record = "".join(f"{name},sha256={digest(text)},{len(text)}\n" for name, text in files.items())
    files[f"swing_{n}-1.dist-info/RECORD"] = record + f"swing_{n}-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def packages():
    """pip installs one package after the other; `installed` is how many it has done."""
    os.makedirs(f"{home}/wheels", exist_ok=True)
    n = 0
    while True:
        n += 1
        path = wheel(n)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir",
                        "--break-system-packages", "--root-user-action=ignore", f"--prefix={home}/site", path], check=True)
        os.remove(path)
        done("installed", n)


def removal():
    """A tree of 40 directories with 200 files each is removed with rm -rf, one after the other; then there is a new one."""
    generation = 0
    while True:
        generation += 1
        top = f"{home}/large/{generation}"
        for directory in range(40):
            os.makedirs(f"{top}.part/{directory}")
            for at in range(200):
                with open(f"{top}.part/{directory}/{at}", "w") as file:
                    file.write(f"{generation} {directory} {at}")
        os.rename(f"{top}.part", top)
        for directory in range(40):
            subprocess.run(["rm", "-rf", f"{top}/{directory}"], check=True)
            done("removed", generation * 1000 + directory)
        os.rmdir(top)


{"page": page, "packages": packages, "removal": removal, "counters": counters, "database": database, "tree": tree, "pages": pages,
 "rewrite": lambda: rewrite(sys.argv[2])}[what]()
