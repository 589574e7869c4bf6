#!/usr/bin/env python3
"""Builds two images that only say hello, without root: "hello-container.tar" (an OCI image layout as a tar file, made of
this machine's static busybox) and "hello-microvm.elf" (a bare-metal program, for microVMs).

Byte for byte the same for the same sources. Nothing is built again while the sources are unchanged.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

GUESTS = Path(__file__).resolve().parent.parent / "crates/hv-driver-firecracker/guests"
BUSYBOX = Path("/bin/busybox")

# Greets, then echoes what is typed until it is told to end. As the first process of its container it is deaf to signals
# that it does not ask for.
HELLO = """#!/bin/sh
trap 'exit 0' TERM INT
echo "hypervisor-guest: hello from a container (user $(id -u), process $$)"
exec 3<&0
cat <&3 &
wait $!
"""

DIRECTORIES = ("bin", "dev", "etc", "proc", "sys", "tmp")
FILES = {
    "etc/passwd": "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Bare metal: no libc, no vector registers, one segment at 1 MiB.
GCC_FLAGS = (
    "-O1 -ffreestanding -mgeneral-regs-only -mno-red-zone -fno-pic -fno-stack-protector "
    "-fno-asynchronous-unwind-tables -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,noexecstack "
    "-Wl,--no-warn-rwx-segments"
).split()
GUEST_SOURCES = ("start.S", "memory.c", "console.c")


class BuildError(Exception):
    """An image cannot be built; the message says why and what to do."""


def say(text):
    print(f"images hello: {text}", flush=True)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# --- the container ----------------------------------------------------------------------------------------------------


def tar_of(entries):
    """A tar archive of (name, content, mode) owned by root, without times: None is a directory, a str a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content, mode in entries:
            info = tarfile.TarInfo(name)
            info.mode = mode
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def layer():
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    return tar_of(
        [(name, None, 0o1777 if name == "tmp" else 0o755) for name in DIRECTORIES]
        + [("bin/busybox", BUSYBOX.read_bytes(), 0o755)]
        + [(f"bin/{applet}", "busybox", 0o777) for applet in sorted(applets) if applet != "busybox"]
        + [(name, text.encode(), 0o644) for name, text in FILES.items()]
        + [("bin/hello", HELLO.encode(), 0o755)]
    )


def needs_loader(program):
    """Whether a program names a loader (ELF-64, PT_INTERP): it would not run alone."""
    headers, size, count = (int.from_bytes(program[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2)))
    return any(program[headers + i * size : headers + i * size + 4] == b"\3\0\0\0" for i in range(count))


def container_image():
    """An OCI image layout (image-spec 1.1) with one image, as a tar file."""
    if not BUSYBOX.is_file() or needs_loader(BUSYBOX.read_bytes()):
        raise BuildError(f"{BUSYBOX} is missing or not static: install the package busybox-static")
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    blobs = {}

    def blob(kind, data):
        blobs[sha256(data)] = data
        media_type = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media_type, "digest": f"sha256:{sha256(data)}", "size": len(data)}

    def document(content):
        return json.dumps(content, separators=(",", ":")).encode()

    content = layer()
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/bin/hello"], "Env": ["PATH=/bin"], "WorkingDir": "/tmp"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(content)}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", document(config)),
        "layers": [blob("layer.v1.tar", content)],
    }
    index = {"schemaVersion": 2, "manifests": [blob("manifest.v1+json", document(manifest))]}
    return tar_of(
        [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644), ("index.json", document(index), 0o644)]
        + [("blobs", None, 0o755), ("blobs/sha256", None, 0o755)]
        + [(f"blobs/sha256/{digest}", data, 0o644) for digest, data in sorted(blobs.items())]
    )


# --- the microVM ------------------------------------------------------------------------------------------------------


def microvm_image():
    """An ELF file that Firecracker boots as a kernel."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "hello.elf"
        sources = [str(GUESTS / name) for name in GUEST_SOURCES]
        command = ["gcc", *GCC_FLAGS, f"-Wl,-T,{GUESTS / 'link.ld'}", *sources, "-o", str(out)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            raise BuildError("gcc is missing: run hack/setup.sh packages") from None
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return out.read_bytes()


# --- both -------------------------------------------------------------------------------------------------------------


def recipe():
    """A hash over everything that decides what the images contain."""
    digest = hashlib.sha256()
    for path in (Path(__file__).resolve(), BUSYBOX, *sorted(GUESTS.iterdir())):
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="cache directory; the images go to its images/")
    images = parser.parse_args().cache / "images"
    images.mkdir(parents=True, exist_ok=True)
    wanted = {"hello-container.tar": container_image}
    if platform.machine() == "x86_64":
        wanted["hello-microvm.elf"] = microvm_image
    else:
        say(f"left out the microVM: its program is for x86_64 only, this machine is {platform.machine()}")
    stamp = images / "hello.stamp"
    with (images / ".hello.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_there = all((images / name).is_file() for name in wanted)
        if is_there and stamp.is_file() and stamp.read_text() == recipe():
            say("already there")
            return
        for name, make in wanted.items():
            partial = images / f".{name}.partial"
            partial.write_bytes(make())
            os.replace(partial, images / name)
        stamp.write_text(recipe())
    say(f"built: {', '.join(str(images / name) for name in wanted)}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as problem:
        sys.exit(f"images hello: {problem}")
