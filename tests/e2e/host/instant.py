"""Whether an image holds one instant of what writers.py writes: LAYOUT DIGEST LAYERS-OF-THE-BASE
[unsettled]. With the last, requests that no process waited for may be in it in part, as the save has said. Applies the layers above
the base by itself, sharing no code with the program."""
import base64, csv, hashlib, json, os, shutil, sqlite3, sys, tarfile, tempfile

layout, digest, base = sys.argv[1], sys.argv[2], int(sys.argv[3])
blob = lambda digest: f"{layout}/blobs/sha256/{digest.split(':')[1]}"
layers = json.load(open(blob(digest)))["layers"][base:]
root = tempfile.mkdtemp()
inside = lambda name: name.strip("/") == "home/w" or name.startswith("home/w/")
try:
    for layer in layers:
        with tarfile.open(blob(layer["digest"])) as tar:
            seen = set()
            for member in tar:
                path = os.path.join(root, member.name)
                assert member.name not in seen, f"{member.name} twice in one layer"
                seen.add(member.name)
                parent, name = os.path.split(path)
                if not inside(member.name):
                    continue
                if name.startswith(".wh."):
                    gone = os.path.join(parent, name[4:])
                    assert os.path.lexists(gone), f"a whiteout of nothing: {member.name}"
                    shutil.rmtree(gone) if os.path.isdir(gone) else os.remove(gone)
                elif member.isdir():
                    os.makedirs(path, exist_ok=True)
                else:
                    assert member.isfile(), member.name
                    if os.path.lexists(path):
                        os.remove(path)
                    with open(path, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
    home = os.path.join(root, "home/w")
    read = lambda name, at=0, size=16: open(f"{home}/{name}", "rb").read()[at:at + size]
    if os.path.exists(f"{home}/last"):
        log = open(f"{home}/log", "rb").read()
        lines = log.split(b"\n")
        whole = lines[:-1]
        assert lines[-1] == b"", f"half a line: {lines[-1]}"
        begun = int(whole[0]) if whole else 0
        # writers.py begins it anew after every 200,000 lines.
        assert begun % 200_000 == 1 or not whole, f"the log begins with {begun}"
        assert [int(line) for line in whole] == list(range(begun, begun + len(whole))), "a hole in the log"
        names = os.listdir(f"{home}/names")
        assert len(names) == 1, f"renamed into {names}"
        order = [int(read("first")), int(read("map1", 4096)), int(read("map2", 500000)), int(names[0]), int(read("last"))]
        # Where it is empty, its last line was of such a number.
        order.insert(3, begun + len(whole) - 1 if whole else order[2] - order[2] % 200_000)
        assert order == sorted(order, reverse=True) and order[0] - order[-1] <= 1, f"not one instant: {order}"
        print("counters", order[0], end=" ")
    if os.path.exists(f"{home}/db"):
        db = sqlite3.connect(f"{home}/db")
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        if db.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0] == 2:
            a, b = (db.execute(f"select * from {table} order by n").fetchall() for table in "ab")
            assert a == b, "half a transaction"
            print("rows", len(a), end=" ")
        db.close()
    if os.path.exists(f"{home}/tree"):
        there = {}
        for directory, _, files in os.walk(f"{home}/tree"):
            for name in files:
                there[name] = open(os.path.join(directory, name)).read()
        parts = [name for name in there if name.endswith(".part")]
        numbers = sorted(int(name) for name in there if not name.endswith(".part"))
        assert len(parts) <= 1 and all(there[str(n)] == str(n) * 200 for n in numbers), "a file of the tree is torn"
        if numbers:
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "a hole in the tree"
            assert len(numbers) <= 1001
        print("tree", len(numbers), end=" ")
    if os.path.exists(f"{home}/pages"):
        one, two = (open(f"{home}/pages{k}", "rb").read() for k in (1, 2))
        assert len(one) == len(two) == 64 << 20
        places = range(0, len(one), 4096)
        differ = [at for at in places if one[at:at + 4096] != two[at:at + 4096]]
        assert len(differ) <= 1, f"{len(differ)} pages are not of one instant"
        assert all(one[at:at + 16] > two[at:at + 16] for at in differ), "the second file is ahead of the first"
        print("pages", max(int(one[at:at + 16]) for at in places), end=" ")
    for name in sorted(name for name in os.listdir(home) if name.startswith("rewrite-") and "." not in name):
        data, way = open(f"{home}/{name}", "rb").read(), name.split("-")[1]
        numbers = [int(data[at:at + 16].strip(b"\0") or 0) for block in range(0, len(data), 4096) for at in (block, block + 4080)]
        kinds, emptied = set(numbers), way in ("zero", "punch") and not any(numbers) or way == "truncate" and not data
        if way == "mmap":
            assert numbers == sorted(numbers, reverse=True) and max(numbers) - min(numbers) <= 1, f"{name} is torn: {kinds}"
        elif len(kinds) != 1 and not emptied:
            asked = way in ("libaio", "io_uring") and "unsettled" in sys.argv[4:] and max(numbers) - min(numbers) == 1
            assert asked, f"{name} is torn: {kinds}"
            print(way, "in part", end=" ")
        assert emptied or len(data) == 16 << 20, f"{name} has {len(data)} bytes"
        print(way, max(numbers, default=0), end=" ")
    if os.path.exists(f"{home}/page"):
        print("page", int(read("page", 4096) or 0), end=" ")
    if os.path.exists(f"{home}/installed"):
        installed = int(read("installed"))
        site = next(at for at, below, _ in os.walk(f"{home}/site") if at.endswith("-packages"))
        for n in range(1, installed + 1):
            with open(f"{site}/swing_{n}-1.dist-info/RECORD") as record:
                rows = list(csv.reader(record))
            assert len(rows) > 600, f"package {n}: {len(rows)} files"
            for name, digest, _ in rows:
                content = open(os.path.join(site, name), "rb").read()
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert not digest or digest == f"sha256={expected}", f"package {n}: {name} is not what was installed"
        others = {int(name.split("-")[0].split("_")[1]) for name in os.listdir(site) if name.startswith("swing_")}
        assert others <= set(range(1, installed + 2)), f"{installed} were installed, and there are {sorted(others)}"
        print("packages", installed, end=" ")
    if os.path.exists(f"{home}/removed"):
        generation, last = divmod(int(read("removed")), 1000)
        generations = [name for name in os.listdir(f"{home}/large") if not name.endswith(".part")]
        assert set(generations) <= {str(generation), str(generation + 1)} and len(generations) <= 1, generations
        for now in generations:
            gone = last if int(now) == generation else -1
            there = {int(name) for name in os.listdir(f"{home}/large/{now}")}
            # The next one may be half removed.
            assert set(range(gone + 2, 40)) <= there <= set(range(gone + 1, 40)), f"after {gone} there are {sorted(there)}"
            for directory in range(gone + 2, 40):
                at = f"{home}/large/{now}/{directory}"
                assert len(os.listdir(at)) == 200, f"{directory} is not whole after {gone}"
                assert all(open(f"{at}/{n}").read() == f"{now} {directory} {n}" for n in range(200)), f"{directory} is torn"
        print("removed", generation, last, end=" ")
    print("layers", len(layers))
finally:
    shutil.rmtree(root)
