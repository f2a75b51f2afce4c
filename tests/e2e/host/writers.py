"""Programs that write hard and in an order that an instant cannot break: run in a container, checked by instant.py."""
import mmap, os, random, sqlite3, sys

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


{"counters": counters, "database": database, "tree": tree, "pages": pages}[what]()
