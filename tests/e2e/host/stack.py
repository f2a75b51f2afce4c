"""Puts layers on the only image of an OCI layout: LAYOUT COUNT. Each has a file of its own, one that every such layer
replaces, and every third a whiteout of the file of the layer below. By itself, as a tool that adds one layer at a time takes
a minute for a hundred."""
import gzip, hashlib, io, json, os, sys, tarfile

layout, count = sys.argv[1], int(sys.argv[2])
path = lambda digest: f"{layout}/blobs/sha256/{digest.split(':')[1]}"
sha256 = lambda content: "sha256:" + hashlib.sha256(content).hexdigest()


def blob(content):
    digest = sha256(content)
    with open(path(digest), "wb") as file:
        file.write(content)
    return {"digest": digest, "size": len(content)}


def tar(number):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ["opt", "opt/stack"]:
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(directory)
        files = {f"only-{number}": f"layer {number}\n", "every": f"last of layer {number}\n"}
        if number % 3 == 2:
            files[f".wh.only-{number - 1}"] = ""
        for name, text in files.items():
            file = tarfile.TarInfo(f"opt/stack/{name}")
            file.mode, file.size = 0o644, len(text)
            archive.addfile(file, io.BytesIO(text.encode()))
    return out.getvalue()


with open(f"{layout}/index.json") as file:
    index = json.load(file)
entry = index["manifests"][0]
manifest = json.load(open(path(entry["digest"])))
config = json.load(open(path(manifest["config"]["digest"])))
for number in range(count):
    content = tar(number)
    layer = blob(gzip.compress(content, 1, mtime=0))
    manifest["layers"].append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **layer})
    config["rootfs"]["diff_ids"].append(sha256(content))
    config.setdefault("history", []).append({"created": "1970-01-01T00:00:00Z", "created_by": f"stack {number}"})
manifest["config"].update(blob(json.dumps(config).encode()))
entry.update(blob(json.dumps(manifest).encode()))
with open(f"{layout}/index.json", "w") as file:
    json.dump(index, file)
