"""Makes the table of a run of the peers from its records, and JSON of the same.

    report.py --records FILE --about FILE [--json FILE]
"""
import argparse
import json
import pathlib
import statistics

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("--records", type=pathlib.Path, required=True)
parser.add_argument("--about", type=pathlib.Path, required=True)
parser.add_argument("--json", type=pathlib.Path)
arguments = parser.parse_args()

about = json.loads(arguments.about.read_text())
records = [json.loads(line) for line in arguments.records.read_text().splitlines()]
# Round 0 only made everything warm.
records = [record for record in records if record["round"] > 0]
groups = {}
for record in records:
    groups.setdefault((record["container"], record["tool"]), []).append(record)
saves = [f"upperdeck {save}" for save in about["saves"]]


def spread(group, field):
    values = [record[field] for record in group if record.get(field) is not None]
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(container, group):
    """How a tool's medians compare with those of the saves of the same container."""
    found = {}
    for save in saves:
        other = groups.get((container, save))
        if not other or other is group:
            continue
        theirs = {record["round"]: record for record in other}
        pairs = [record["wall_s"] / theirs[record["round"]]["wall_s"] for record in group if record["round"] in theirs]
        found[save] = {
            "wall": spread(group, "wall_s")["median"] / spread(other, "wall_s")["median"],
            # Round by round: what a machine that gets slower in between does to it cancels out.
            "wall_by_round_median": statistics.median(pairs) if pairs else None,
            "cpu": spread(group, "cpu_s")["median"] / spread(other, "cpu_s")["median"],
            "layer": spread(group, "layer_bytes")["median"] / spread(other, "layer_bytes")["median"],
        }
    return found


fields = ("wall_s", "cpu_s", "registry_cpu_s", "others_cpu_s", "stolen_cpu_s", "layer_bytes", "layers", "stood_still_s", "longest_pause_s", "peak_rss_bytes")
summary = []
for (container, tool), group in groups.items():
    row = {"container": container, "tool": tool, "runs": len(group)}
    row |= {field: spread(group, field) for field in fields if spread(group, field)}
    row["step_wall_s"] = [statistics.median(step) for step in zip(*(record["step_wall_s"] for record in group))]
    row["against"] = ratios(container, group)
    summary.append(row)


def cells(row):
    wall, still = row["wall_s"], row.get("stood_still_s")
    steps = " + ".join(f"{step:.2f}" for step in row["step_wall_s"]) if len(row["step_wall_s"]) > 1 else ""
    line = [
        row["container"],
        row["tool"],
        f"{wall['median']:.2f}",
        f"{wall['min']:.2f} to {wall['max']:.2f}",
        steps,
        f"{row['cpu_s']['median']:.2f}",
        f"{row['layer_bytes']['median'] / 1e6:.2f}",
        f"{still['median']:.2f}" if still else "",
    ]
    for save in saves:
        ratio = row["against"].get(save)
        line += [f"{ratio[key]:.2f}" for key in ("wall", "cpu", "layer")] if ratio else ["", "", ""]
    return line


heads = ["container", "tool", "wall s", "min to max", "commit + push", "CPU s", "layer MB", "still s"]
for save in saves:
    heads += [f"wall / {save.removeprefix('upperdeck ')}", "CPU", "layer"]
# The order of the containers, and in them upperdeck first.
order = sorted(summary, key=lambda row: (about["containers"].index(row["container"]), row["tool"] not in saves))
table = [heads, *map(cells, order)]
widths = [max(map(len, column)) for column in zip(*table)]


def line(row):
    padded = [cell.ljust(width) if index < 2 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))]
    return "| " + " | ".join(padded) + " |"


print(f"{about['entries']} entries, {about['tar_bytes'] / 1e6:.1f} MB of tar; {about['rounds']} rounds; {about['cores']} cores, "
      f"{about['processor']}, Linux {about['kernel']}; {about['cache']} page cache")
print("; ".join(about["versions"]))
for absent in about["absent"]:
    print(f"left out: {absent}")
print()
print(line(table[0]))
print("|" + "|".join(" --- " if index < 2 else " ---: " for index in range(len(widths))) + "|")
for row in table[1:]:
    print(line(row))
print()


def at_the_same_size(save):
    """Between the two levels of pigz whose sizes enclose the save's: what pigz would take at just that size."""
    ours = next((row for row in order if row["tool"] == save), None)
    levels = [row for row in order if row["tool"].startswith("pigz")]
    if ours is None or len(levels) != 2:
        return None
    size = ours["layer_bytes"]["median"]
    larger, smaller = sorted(levels, key=lambda row: -row["layer_bytes"]["median"])
    sizes = [row["layer_bytes"]["median"] for row in (larger, smaller)]
    if not sizes[0] >= size >= sizes[1] or sizes[0] == sizes[1]:
        return None
    share = (sizes[0] - size) / (sizes[0] - sizes[1])

    def between(field):
        return larger[field]["median"] + share * (smaller[field]["median"] - larger[field]["median"])

    return {
        "save": save,
        "pigz_cpu_s": between("cpu_s"),
        "pigz_wall_s": between("wall_s"),
        "cpu": ours["cpu_s"]["median"] / between("cpu_s"),
        "wall": ours["wall_s"]["median"] / between("wall_s"),
    }


same_size = at_the_same_size(saves[0])
for row in order:
    if row["tool"] in saves or row["tool"].startswith("pigz"):
        continue
    for save, ratio in row["against"].items():
        if row["tool"] == "layer to a file":
            if save == saves[0]:
                print(f"{save} to the registry takes {1 / ratio['wall']:.2f} of the time of the layer to a file")
        else:
            print(f"{row['tool']} takes {ratio['wall']:.2f} times as long as {save} "
                  f"({ratio['wall_by_round_median']:.2f} round by round); the layer of {save} is {1 / ratio['layer']:.3f} of its")
if same_size:
    print(f"{same_size['save']} takes {same_size['cpu']:.2f} of the CPU seconds of pigz alone at the same size "
          f"({same_size['pigz_cpu_s']:.2f} s, between its levels)")


# A tenth of the time of one core.
disturbed = [record for record in records if record["others_cpu_s"] + record["stolen_cpu_s"] > 0.1 * record["wall_s"]]
if disturbed:
    share = max((record["others_cpu_s"] + record["stolen_cpu_s"]) / record["wall_s"] for record in disturbed)
    print(f"\nIn {len(disturbed)} of {len(records)} saves other programs, or the hypervisor, used up to {share:.2f} cores: measure again on "
          "a quiet machine")
if arguments.json:
    whole = {"about": about, "summary": order, "pigz_at_the_same_size": same_size, "runs": records}
    arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
