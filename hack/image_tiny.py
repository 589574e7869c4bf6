#!/usr/bin/env python3
"""Builds the guest images "tiny" (kernel, initrd, cmdline) and "tiny-disk.qcow2" without root.

The distribution's kernel, busybox and QEMU guest agent are downloaded as packages and unpacked; the initrd is written
here, byte for byte the same for the same packages. Nothing is built again while this file and hack/guest are unchanged.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GUEST_DIR = Path(__file__).resolve().parent / "guest"

# Where a kernel comes from, in this order: the package that the first known one of these depends on. Debian's cloud
# kernel and Ubuntu's virtual one are the smallest that carry virtio.
KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64")

# Modules by the moment they are loaded; dependencies are read from the modules themselves.
MODULES_BY_STAGE = {
    "boot": ("virtio_pci", "virtio_blk"),
    "seed": ("vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1", "nls_utf8", "isofs"),
    "rest": ("virtio_net", "virtio_console", "virtio-rng", "virtio_balloon", "button", "evdev"),
}

# Guest files: path in the guest, file in hack/guest.
GUEST_FILES = {
    "init": "init",
    "etc/inittab": "inittab",
    "etc/profile": "profile",
    "etc/udhcpc.script": "udhcpc.script",
    "etc/acpi/PWRF/00000080": "power-button",
    "bin/guest-agent": "guest-agent",
    "sbin/shutdown": "shutdown",
}
GUEST_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}
GUEST_DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "root", "etc", "bin", "sbin", "usr", "usr/sbin", "lib", "mnt")

# What an emulated CPU need not do. Measured under TCG, to the greeting: cryptomgr.notests (the kernel's tests of its own
# ciphers) saves 0.45 s, no security modules and no audit 0.1 s; quiet saves an exit for each letter on the serial port.
CMDLINE = "console=ttyS0 quiet no_timer_check cryptomgr.notests lsm= audit=0 random.trust_cpu=on mitigations=off nokaslr"

FAT_SLACK_BYTES = 1 << 20
DISK_SERIAL = "48560001"


class BuildError(Exception):
    """The image cannot be built; the message says why and what to do."""


def say(text):
    print(f"image tiny: {text}", flush=True)


def run(*argv, cwd=None, env=None):
    """Runs a command, returns its standard output; a failure carries the command's own words."""
    try:
        done = subprocess.run(argv, cwd=cwd, env=env, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"command {argv[0]} is missing: run hack/setup.sh packages") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, argv))}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# --- packages -------------------------------------------------------------------------------------------------------


def kernel_packages():
    """The names of the packages that hold the kernel image and its modules."""
    for meta in KERNEL_METAPACKAGES:
        done = subprocess.run(["apt-cache", "depends", meta], check=False, capture_output=True, text=True)
        names = [line.split()[-1] for line in done.stdout.splitlines() if "Depends:" in line]
        images = [name for name in names if name.startswith("linux-image-")]
        if not images:
            continue
        version = images[0].removeprefix("linux-image-")
        return [images[0], *separate_modules(version)]
    raise BuildError(f"no kernel package known to apt (looked for {', '.join(KERNEL_METAPACKAGES)}): apt-get update")


def separate_modules(version):
    """Ubuntu keeps the modules in a package of their own."""
    name = f"linux-modules-{version}"
    known = subprocess.run(["apt-cache", "show", name], check=False, capture_output=True).returncode == 0
    return [name] if known else []


def unpack(package, downloads, root):
    """Downloads the package where it is not there yet and unpacks it below root."""
    found = download(package, downloads)
    run("dpkg", "-x", str(found), str(root))
    return found.name


def download(package, downloads):
    candidate = run("apt-cache", "show", "--no-all-versions", package)
    version = next(line.split()[1] for line in candidate.splitlines() if line.startswith("Version:"))
    pattern = f"{package}_{version.replace(':', '%3a')}_*.deb"
    found = list(downloads.glob(pattern))
    if not found:
        with tempfile.TemporaryDirectory(dir=downloads) as fresh:
            run("apt-get", "download", package, cwd=fresh)
            for deb in Path(fresh).glob("*.deb"):
                deb.rename(downloads / deb.name)
        found = list(downloads.glob(pattern)) or list(downloads.glob(f"{package}_*.deb"))
    if not found:
        raise BuildError(f"package {package} was not downloaded")
    return found[0]


# --- the root file system -------------------------------------------------------------------------------------------


def modules_root(root):
    for base in (root / "lib/modules", root / "usr/lib/modules"):
        for directory in sorted(base.glob("*")):
            return directory
    raise BuildError("the kernel package has no modules")


def find_module(modules, name):
    spelled = {name, name.replace("-", "_"), name.replace("_", "-")}
    for path in modules.rglob("*.ko*"):
        if path.name.split(".ko")[0] in spelled:
            return path
    return None


def is_builtin(modules, name):
    listed = (modules / "modules.builtin").read_text().split()
    return any(Path(entry).stem.replace("-", "_") == name.replace("-", "_") for entry in listed)


def module_bytes(path):
    if path.suffix == ".ko":
        return path.read_bytes()
    tool = {".zst": "zstd", ".xz": "xz", ".gz": "gzip"}.get(path.suffix)
    if tool is None:
        raise BuildError(f"module {path.name}: compression is not known")
    return subprocess.run([tool, "-dc", str(path)], check=True, capture_output=True).stdout


def module_dependencies(content):
    for field in content.split(b"\0"):
        if field.startswith(b"depends="):
            return [name for name in field[len(b"depends=") :].decode().split(",") if name]
    return []


def add_modules(tree, modules):
    """Copies the modules with what they depend on and writes the load list of each stage."""
    placed = set()
    (tree / "lib/modules").mkdir(parents=True)

    def place(name, listed):
        key = name.replace("-", "_")
        if key in placed or is_builtin(modules, name):
            return
        path = find_module(modules, name)
        if path is None:
            raise BuildError(f"the kernel has no module {name}")
        placed.add(key)
        content = module_bytes(path)
        for dependency in module_dependencies(content):
            place(dependency, listed)
        (tree / "lib/modules" / f"{key}.ko").write_bytes(content)
        listed.append(f"{key}.ko")

    for stage, names in MODULES_BY_STAGE.items():
        listed = []
        for name in names:
            place(name, listed)
        (tree / f"lib/modules/{stage}.list").write_text("".join(f"{entry}\n" for entry in listed))


def add_busybox(tree, root):
    busybox = next((p for p in (root / "bin/busybox", root / "usr/bin/busybox") if p.is_file()), None)
    if busybox is None:
        raise BuildError("the package busybox-static has no busybox")
    shutil.copy(busybox, tree / "bin/busybox")
    for applet in run(str(busybox), "--list").split():
        if applet != "busybox" and not (tree / "bin" / applet).exists():
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin/init").symlink_to("../bin/busybox")


def add_guest_agent(tree, root):
    """Copies qemu-ga with its shared libraries; says so and leaves it out where this machine lacks one of them."""
    agent = root / "usr/sbin/qemu-ga"
    if not agent.is_file():
        agent = root / "usr/bin/qemu-ga"
    missing, libraries = shared_libraries(agent)
    if missing:
        say(f"left out the guest agent: libraries missing here: {', '.join(missing)}")
        return
    shutil.copy(agent, tree / "usr/sbin/qemu-ga")
    for library in libraries:
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(library), target)


def shared_libraries(binary):
    missing, found = [], []
    for line in run("ldd", str(binary)).splitlines():
        words = line.split()
        if "not found" in line:
            missing.append(words[0])
        elif "=>" in words:
            found.append(words[2])
        elif words[0].startswith("/"):
            found.append(words[0])
    return missing, found


def make_tree(tree, root):
    for directory in GUEST_DIRECTORIES:
        (tree / directory).mkdir(parents=True, exist_ok=True)
    add_modules(tree, modules_root(root))
    add_busybox(tree, root)
    add_guest_agent(tree, root)
    for target, source in GUEST_FILES.items():
        path = tree / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        shutil.copy(GUEST_DIR / source, path)
    for target, text in GUEST_TEXTS.items():
        (tree / target).write_text(text)


def cpio_archive(tree):
    """The tree as a cpio archive ("newc"), owned by root, without times; /dev/console is added as a device."""
    chunks = []

    def entry(name, mode, data=b"", rdev=(0, 0)):
        encoded = name.encode() + b"\0"
        fields = (len(chunks), mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        chunks.append(header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4))

    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            entry(name, stat.S_IFLNK | 0o777, os.readlink(path).encode())
        elif stat.S_ISDIR(info.st_mode):
            entry(name, stat.S_IFDIR | 0o755)
        else:
            executable = 0o755 if info.st_mode & stat.S_IXUSR else 0o644
            entry(name, stat.S_IFREG | executable, path.read_bytes())
    entry("dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1))
    entry("TRAILER!!!", 0)
    return b"".join(chunks)


# --- the images -----------------------------------------------------------------------------------------------------


def make_directory_image(out, tree, root):
    kernel = next((root / "boot").glob("vmlinuz-*"), None)
    if kernel is None:
        raise BuildError("the kernel package has no /boot/vmlinuz")
    out.mkdir()
    shutil.copyfile(kernel, out / "kernel")
    # Not compressed: QEMU hands it over by DMA, and unpacking costs an emulated CPU more than reading.
    (out / "initrd").write_bytes(cpio_archive(tree))
    (out / "cmdline").write_text(CMDLINE + "\n")


def make_disk_image(out, image, work):
    """A disk without partitions: FAT with syslinux, which BIOS starts like any other boot sector."""
    initrd = work / "initrd.gz"
    initrd.write_bytes(subprocess.run(["gzip", "-9nc", image / "initrd"], check=True, capture_output=True).stdout)
    config = work / "syslinux.cfg"
    config.write_text(f"DEFAULT tiny\nPROMPT 0\nLABEL tiny\n LINUX kernel\n INITRD initrd\n APPEND {CMDLINE}\n")
    raw = work / "disk.img"
    bytes_needed = (image / "kernel").stat().st_size + initrd.stat().st_size + FAT_SLACK_BYTES
    megabytes = -(-bytes_needed // (1 << 20)) + 1
    with raw.open("wb") as file:
        file.truncate(megabytes << 20)
    env = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "SOURCE_DATE_EPOCH": "0"}
    # 64 heads of 32 sectors: one cylinder is 1 MiB.
    geometry = ("-h", "64", "-s", "32", "-t", str(megabytes))
    run("mformat", "-i", raw, *geometry, "-v", "TINY", "-N", DISK_SERIAL, "::", env=env)
    run("syslinux", "--install", str(raw), env=env)
    for source, target in ((image / "kernel", "kernel"), (initrd, "initrd"), (config, "syslinux.cfg")):
        run("mcopy", "-i", raw, source, f"::{target}", env=env)
    run("qemu-img", "convert", "-c", "-O", "qcow2", str(raw), str(out))


def build(images, downloads):
    """Builds both images beside the old ones and puts them into place at the end. Returns the packages' file names."""
    with tempfile.TemporaryDirectory(dir=images, prefix=".build-") as name:
        work = Path(name)
        root, tree = work / "root", work / "tree"
        root.mkdir()
        wanted = (*kernel_packages(), "busybox-static", "qemu-guest-agent")
        packages = [unpack(package, downloads, root) for package in wanted]
        say("unpacked " + ", ".join(packages))
        make_tree(tree, root)
        make_directory_image(work / "tiny", tree, root)
        make_disk_image(work / "tiny-disk.qcow2", work / "tiny", work)
        if (images / "tiny").exists():
            (images / "tiny").rename(work / "old")
        (work / "tiny").rename(images / "tiny")
        (work / "tiny-disk.qcow2").rename(images / "tiny-disk.qcow2")
    return packages


def recipe():
    """A hash over everything of the project that decides what the images contain."""
    digest = hashlib.sha256()
    for path in (Path(__file__).resolve(), *sorted(GUEST_DIR.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def up_to_date(images, stamp):
    expected = [images / "tiny" / name for name in ("kernel", "initrd", "cmdline")] + [images / "tiny-disk.qcow2"]
    return all(path.is_file() for path in expected) and stamp.is_file() and stamp.read_text().split("\n")[0] == recipe()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="cache directory; the images go to its images/")
    parser.add_argument("--fresh", action="store_true", help="build again, with the newest kernel of the package lists")
    arguments = parser.parse_args()
    if platform.machine() != "x86_64":
        raise BuildError(f"the tiny guest is built for x86_64 only, this machine is {platform.machine()}")
    images, downloads = arguments.cache / "images", arguments.cache / "downloads"
    images.mkdir(parents=True, exist_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    stamp = images / "tiny.stamp"
    with (images / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not arguments.fresh and up_to_date(images, stamp):
            say("already there")
            return
        started = time.monotonic()
        packages = build(images, downloads)
        stamp.write_text("\n".join([recipe(), *packages]) + "\n")
        say(f"built in {time.monotonic() - started:.1f} s: {images}/tiny and tiny-disk.qcow2")


if __name__ == "__main__":
    try:
        main()
    except BuildError as problem:
        sys.exit(f"image tiny: {problem}")
