#!/usr/bin/env python3
"""Checks what the compiler does not: which crate may depend on which, and what every source file owes its reader.

Reads `cargo metadata --no-deps --offline` of the workspace; prints each breach with the rule, and fails if there is one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MAX_LINES = 700

# Layer of each crate; every crate of the workspace is named here. Drivers are recognised by their prefix.
LAYERS = {
    "hv-types": 1,
    "hv-config": 1,
    "hv-telemetry": 1,
    "hv-proto": 2,
    "hv-store": 2,
    "hv-driver": 2,
    "hv-scheduler": 3,
    "hv-cluster": 3,
    "hv-machine": 3,
    "hv-client": 4,
    "hv-image": 4,
    "hypervisor-server": 5,
    "hypervisor-agent": 5,
    "hypervisor-ctl": 5,
    "hv-testkit": 5,
    "xtask": 5,
}
DRIVER_PREFIX = "hv-driver-"
DRIVER_LAYER = 4

# Edges between crates of one layer that are part of the design; all others within a layer are refused.
SIDEWAYS = {
    ("hv-store", "hv-proto"),
    ("hv-cluster", "hv-scheduler"),
    # The simulation runs both programs in one process.
    ("hv-testkit", "hypervisor-server"),
    ("hv-testkit", "hypervisor-agent"),
}

# What a program must not contain, directly or through another crate: program, crate, why.
REFUSED = (
    ("hypervisor-server", "hv-driver", "the server never imports a driver"),
    ("hypervisor-agent", "hv-store", "nodes hold no store credentials"),
    ("hypervisor-agent", "hv-cluster", "cluster logic runs in the server"),
    ("hypervisor-ctl", "hv-store", "the command line speaks to the API only"),
)

# Foreign crates that have one owner, or none: crate, who may name it in its dependencies.
OWNERS = {
    "containerd-client": {"hv-driver-containerd"},
    "oci-spec": {"hv-driver-containerd"},
    "etcd-client": {"hv-store"},
    "fatfs": {"hv-machine"},
    "protox": {"hv-proto"},
    "reqwest": {"hv-image"},
    "ruzstd": {"hv-image"},
}
# Crates of pure values and logic name none of these.
PURE = {"hv-types", "hv-scheduler"}
IMPURE = {"tokio", "tonic", "redb", "axum", "hyper"}


def layer(crate):
    return DRIVER_LAYER if crate.startswith(DRIVER_PREFIX) else LAYERS.get(crate)


def edge_breach(crate, dependency, kind):
    """Why the edge is refused, None where it is allowed. kind: normal, dev or build."""
    if kind == "dev":
        # Tests may use what stands above them: the test kit, fakes, conformance suites.
        return None
    if dependency == "hv-testkit":
        return "hv-testkit is for tests (dev-dependencies) only"
    if crate.startswith(DRIVER_PREFIX) and dependency.startswith(DRIVER_PREFIX):
        return "drivers never import each other"
    above, below = layer(crate), layer(dependency)
    if below > above:
        return f"layer {above} must not depend on layer {below}"
    if below == above and (crate, dependency) not in SIDEWAYS:
        return f"both are of layer {above}, and the edge is not among those of the design"
    return None


def foreign_breach(crate, dependency, kind):
    if dependency in OWNERS and crate not in OWNERS[dependency]:
        return f"only {', '.join(sorted(OWNERS[dependency]))} may depend on it"
    if crate in PURE and dependency in IMPURE and kind != "dev":
        return f"{crate} is free of I/O and of a runtime"
    return None


def check_edges(packages):
    names = {package["name"] for package in packages}
    for package in packages:
        crate = package["name"]
        if layer(crate) is None:
            yield f"{crate}: has no layer; give it one in hack/check_layers.py"
            continue
        for dependency in package["dependencies"]:
            name, kind = dependency["name"], dependency["kind"] or "normal"
            breach_of = edge_breach if name in names else foreign_breach
            breach = breach_of(crate, name, kind) if name not in names or layer(name) is not None else None
            if breach:
                yield f"{crate} -> {name}: {breach}"


def check_programs(packages):
    """Follows normal and build dependencies: a refused crate must not come in through a third one either."""
    direct = {
        package["name"]: {d["name"] for d in package["dependencies"] if d["kind"] != "dev"} for package in packages
    }
    for program, refused, reason in REFUSED:
        paths = {program: [program]}
        queue = [program]
        while queue:
            crate = queue.pop()
            for name in direct.get(crate, ()):
                if name in direct and name not in paths:
                    paths[name] = [*paths[crate], name]
                    queue.append(name)
        for name, path in sorted(paths.items()):
            if name == refused or name.startswith(f"{refused}-"):
                yield f"{' -> '.join(path)}: {reason}"


def check_sources(packages):
    for package in packages:
        for path in sorted(Path(package["manifest_path"]).parent.rglob("*.rs")):
            if "target" in path.parts:
                continue
            lines = path.read_text().splitlines()
            name = path.relative_to(REPO)
            if not lines or not lines[0].startswith("//!"):
                yield f"{name}: must open with //! and say what it is"
            if len(lines) > MAX_LINES:
                yield f"{name}: {len(lines)} lines; split it by noun, the limit is {MAX_LINES}"


def check_map(packages):
    architecture = REPO / "docs/ARCHITECTURE.md"
    if not architecture.is_file():
        return
    text = architecture.read_text()
    for package in packages:
        if package["name"] not in text:
            yield f"docs/ARCHITECTURE.md: does not name the crate {package['name']}"


def main():
    cargo = os.environ.get("CARGO", "cargo")
    command = [cargo, "metadata", "--no-deps", "--offline", "--format-version", "1"]
    metadata = json.loads(subprocess.run(command, cwd=REPO, check=True, capture_output=True).stdout)
    packages = sorted(metadata["packages"], key=lambda package: package["name"])
    breaches = [*check_edges(packages), *check_programs(packages), *check_sources(packages), *check_map(packages)]
    for breach in breaches:
        print(f"layers: {breach}")
    if breaches:
        sys.exit(1)
    print(f"layers: {len(packages)} crates, every edge points down")


if __name__ == "__main__":
    main()
