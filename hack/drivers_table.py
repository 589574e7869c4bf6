#!/usr/bin/env python3
"""The table of drivers and capabilities: printed, written into docs/DRIVERS.md, and held against the drivers' own word.

  drivers_table.py print LOG   prints what a run of the conformance suites came to
  drivers_table.py write LOG   writes it into docs/DRIVERS.md; what LOG does not tell of stays as it is
  drivers_table.py check [LOG] fails where the committed table differs from what the drivers declare, or from LOG

LOG is the file that HYPERVISOR_CONFORMANCE_LOG named during the run: one line of JSON for each claim. What a driver
declares is the constant CAPABILITIES in its crate. Every cell comes from tests, and no other way.
"""

import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DOCUMENT = REPO / "docs/DRIVERS.md"
CONTRACT = REPO / "crates/hv-driver/src/lib.rs"
CLAIMS = REPO / "crates/hv-driver/src/conformance/claims.rs"
BEGIN = "<!-- table: written by hack/drivers_table.py -->"
END = "<!-- end of table -->"
PREFIX = "hv-driver-"

# The columns, in this order; a driver that is not named here comes after them.
DRIVERS = ("qemu", "libvirt", "containerd", "firecracker", "fake")
# What a row is called; those that are capabilities are so called in the API too.
ROWS = {
    "life_cycle": "create, start, stop, delete",
    "recovery": "found again by a new agent",
    "fencing": "killed without the agent",
    "refusals": "refused with a reason",
    "images": "images of the node",
    "pause": "pause, resume",
    "console": "console, with history",
    "logs": "logs",
    "stats": "counters",
    "exec": "commands",
    "exec_tty": "commands with a terminal",
    "display": "screen (VNC)",
    "user_data": "user data",
    "direct_boot": "kernel given",
    "fetched_images": "images fetched by the agent",
    "limits": "limits",
    "volumes": "directories mounted",
    "devices": "devices of the node",
    "update": "changed, from the next start",
    "rename": "renamed, running or not",
    "resize_live": "cores and memory live",
    "hotplug_disk": "disks live",
    "hotplug_network": "networks live",
    "snapshot": "snapshots",
    "snapshot_memory": "snapshots with memory",
    "clone": "instances from snapshots",
    "migration": "migration: hand-over, abort",
    "migrate": "live migration, shared disks",
    "migrate_storage": "live migration, disks copied",
    "rescue": "rescue",
}

# What a claim says whose runtime is not on the machine.
NOT_HERE = "its runtime is not on this machine"
# The line below the table about suites that run more than once.
AGAINST = "The suite ran against: "
# What a suite runs against that does not say.
ITSELF = "its runtime"

WORKS, PARTLY, REFUSED, UNSHOWN, NOT_RUN, FAILED = "works", "partly", "refused", "not shown", "not run", "FAILED"


def fail(message):
    print(f"drivers: {message}")
    sys.exit(1)


def capabilities():
    """Every capability: the name in the code, and as the API spells it."""
    body = re.search(r"pub enum Capability \{(.*?)\n\}", CONTRACT.read_text(), re.DOTALL)
    if not body:
        fail(f"no capabilities are found in {CONTRACT.relative_to(REPO)}")
    variants = re.findall(r"^    (\w+),", body[1], re.MULTILINE)
    return {variant: re.sub(r"(?<!^)([A-Z])", r"_\1", variant).lower() for variant in variants}


def declared():
    """What each driver's crate declares, by driver."""
    known, found = capabilities(), {}
    for crate in sorted((REPO / "crates").glob(f"{PREFIX}*")):
        for source in sorted(crate.rglob("src/**/*.rs")):
            match = re.search(r"const CAPABILITIES: [^=]+=\s*&?\[([^\]]*)\]", source.read_text())
            if match:
                variants = re.findall(r"Capability::(\w+)", match[1])
                found[crate.name.removeprefix(PREFIX)] = {known[variant] for variant in variants}
    return found


def claimed_rows():
    """The rows that claims of the suite belong to."""
    return {row for _, row, _ in re.findall(r"(\w+)\[(\w+)\]: (\w+),", CLAIMS.read_text())}


def plain(reason):
    """A reason without what differs from run to run."""
    reason = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", reason)
    reason = re.sub(r"(/[\w.+-]+){2,}", "PATH", reason)
    return " ".join(reason.split()).replace("|", "/")


class Cell:
    """What came of the claims of one driver about one row."""

    def __init__(self):
        self.outcomes = {}
        self.reasons = []
        self.against = set()

    def add(self, line):
        outcome = line["outcome"]
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if outcome != "skipped":
            self.against.add(line["against"] or ITSELF)
        reason = plain(line.get("reason", ""))
        if reason and reason not in self.reasons:
            self.reasons.append(reason)

    def verdict(self):
        if "failed" in self.outcomes:
            return FAILED
        if "works" in self.outcomes:
            return PARTLY if "refused" in self.outcomes else WORKS
        return REFUSED if "refused" in self.outcomes else UNSHOWN

    def is_not_here(self):
        return self.reasons == [NOT_HERE]

    def count(self):
        return sum(self.outcomes.values())


def read_log(path):
    """The cells of a run, by driver and row. A claim that was tried again counts with its last outcome."""
    last = {}
    for text in Path(path).read_text().splitlines():
        line = json.loads(text)
        last[line["suite"], line["against"], line["claim"]] = line
    cells = {}
    for line in sorted(last.values(), key=lambda line: (line["suite"], line["row"], line["claim"])):
        key = line["suite"].removeprefix(PREFIX), line["row"]
        cells.setdefault(key, Cell()).add(line)
    return cells


def columns(*sources):
    names = {name for source in sources for name in source}
    return [name for name in DRIVERS if name in names] + sorted(names - set(DRIVERS))


def ran_against(cells):
    """What each driver's suite stood on, where it says so."""
    found = {}
    for (driver, _), cell in cells.items():
        if cell.against:
            found[driver] = sorted({*found.get(driver, ()), *cell.against})
    return {driver: against for driver, against in found.items() if against != [ITSELF]}


def print_table(path):
    cells = read_log(path)
    drivers = columns({driver for driver, _ in cells})
    width = max(len(row) for row in ROWS)
    print("drivers and capabilities: verdict and number of tests")
    print(" " * width + "".join(f"  {driver:<13}" for driver in drivers))
    for row in ROWS:
        found = [cells.get((driver, row)) for driver in drivers]
        if any(found):
            texts = (f"{cell.verdict()} {cell.count()}" if cell else "-" for cell in found)
            print(f"{row:<{width}}" + "".join(f"  {text:<13}" for text in texts).rstrip())
    for driver, against in sorted(ran_against(cells).items()):
        print(f"{driver} ran against: {', '.join(against)}")
    notes = sorted({(d, r, reason) for (d, r), cell in cells.items() for reason in cell.reasons})
    for driver, row, reason in notes:
        print(f"  {driver}, {row}: {reason}")


def committed_table():
    """What is between the markers in the document."""
    text = DOCUMENT.read_text()
    if BEGIN not in text or END not in text:
        fail(f"{DOCUMENT.relative_to(REPO)} lacks the lines `{BEGIN}` and `{END}`")
    return text.split(BEGIN)[1].split(END)[0]


def committed():
    """The committed table, by driver and row: verdict and reasons. Empty where there is none yet."""
    table = committed_table()
    notes = dict(re.findall(r"^\[(\d+)\] (.*)$", table, re.MULTILINE))
    lines = [line.strip().strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    cells = {}
    if not lines:
        return cells
    drivers = [name.strip().strip("`") for name in lines[0][2:]]
    for line in lines[2:]:
        row = line[0].strip().strip("`")
        for driver, text in zip(drivers, line[2:]):
            verdict, _, note = text.strip().partition(" [")
            cells[driver, row] = (verdict, notes.get(note.rstrip("]"), ""))
    return cells


def committed_against():
    line = re.search(f"^{AGAINST}(.*)\\.$", committed_table(), re.MULTILINE)
    parts = re.findall(r"`(\w+)` \(([^)]*)\)", line[1]) if line else []
    return {driver: against.split(", ") for driver, against in parts}


def render(cells, against):
    drivers = columns(declared(), {driver for driver, _ in cells})
    head = "| capability | |" + "".join(f" `{driver}` |" for driver in drivers)
    lines = [head, "|---|---|" + "---|" * len(drivers)]
    numbers = {}
    for row, title in ROWS.items():
        if row not in claimed_rows():
            continue
        texts = []
        for driver in drivers:
            verdict, note = cells.get((driver, row), (NOT_RUN, ""))
            number = f" [{numbers.setdefault(note, len(numbers) + 1)}]" if note else ""
            texts.append(f" {verdict}{number} |")
        lines.append(f"| `{row}` | {title} |" + "".join(texts))
    notes = [f"[{number}] {note}" for note, number in numbers.items()]
    if against:
        parts = (f"`{driver}` ({', '.join(stands)})" for driver, stands in sorted(against.items()))
        notes.insert(0, f"{AGAINST}{'; '.join(parts)}.")
    return "\n".join([BEGIN, "", *lines, "", *"\n\n".join(notes).split("\n"), "", END])


def write(path):
    cells = committed()
    run = read_log(path)
    for (driver, row), cell in run.items():
        if not cell.is_not_here():
            cells[driver, row] = (cell.verdict(), "; ".join(cell.reasons))
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + render(cells, {**committed_against(), **ran_against(run)}) + after)
    print(f"drivers: {DOCUMENT.relative_to(REPO)} is written")


def breaches(path):
    cells, word, known = committed(), declared(), capabilities()
    rows = claimed_rows()
    for row in sorted(rows - set(ROWS)):
        yield f"row `{row}` of the suite has no title; give it one in hack/drivers_table.py"
    for capability in sorted(set(known.values()) - rows):
        yield f"no claim of the suite is about the capability `{capability}`"
    for driver, can in word.items():
        for row in sorted(rows):
            verdict, _ = cells.get((driver, row), (None, ""))
            if verdict is None:
                yield f"{driver}, {row}: the table has no such cell"
            elif verdict == FAILED:
                yield f"{driver}, {row}: the table says that a claim failed"
            elif row not in known.values() or verdict in (UNSHOWN, NOT_RUN, PARTLY):
                # What works in part may hang on the node's configuration.
                continue
            elif (verdict == WORKS) != (row in can):
                promise = "declares it" if row in can else "does not declare it"
                yield f"{driver}, {row}: the driver {promise}, and the table says `{verdict}`"
    for (driver, row), cell in sorted((read_log(path) if path else {}).items()):
        verdict, _ = cells.get((driver, row), (None, ""))
        # What works in part hangs on the machine, and so on which runtimes are there.
        if cell.is_not_here() or verdict == PARTLY:
            continue
        if cell.verdict() not in (verdict, UNSHOWN, NOT_RUN):
            yield f"{driver}, {row}: `{cell.verdict()}` in this run, and the table says `{verdict}`"


def check(path=None):
    found = list(breaches(path))
    for breach in found:
        print(f"drivers: {breach}")
    if found:
        fail("docs/DRIVERS.md is stale: run the suites with HYPERVISOR_CONFORMANCE_LOG=LOG, then drivers_table.py write LOG")
    print(f"drivers: the table agrees with {len(declared())} drivers")


def main():
    match sys.argv[1:]:
        case ["print", path]:
            print_table(path)
        case ["write", path]:
            write(path)
        case ["check"]:
            check()
        case ["check", path]:
            check(path)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
