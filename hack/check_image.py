#!/usr/bin/env python3
"""Boots the tiny images under QEMU and checks what the rest of the project relies on.

Per image: the greeting on the serial console, the host name and instance id of a NoCloud seed, the interactive shell,
DHCP on a user-mode NIC, the guest agent, and a clean power-off on the ACPI button. Prints one line per image with the
seconds of wall and CPU time until the greeting.
"""

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOOT_LIMIT_S = 60
STEP_LIMIT_S = 20
NAME = "check-guest"
USER_DATA = f"#cloud-config\nhostname: {NAME}\nruncmd:\n  - echo ran-by-seed >/dev/console\n"
META_DATA = "instance-id: i-check\nlocal-hostname: other\n"


class CheckError(Exception):
    """The guest did not do what it must; the message carries the end of its console."""


class Line:
    """A socket that is read until a text appears; everything read is kept."""

    def __init__(self, path, limit_s=STEP_LIMIT_S):
        deadline = time.monotonic() + limit_s
        self.socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise CheckError(f"{path} does not accept connections") from None
                time.sleep(0.02)
        self.seen = ""

    def send(self, text):
        self.socket.sendall(text.encode())

    def wait(self, wanted, limit_s=STEP_LIMIT_S):
        """Reads until wanted appears in what has not been consumed; returns everything up to and with it."""
        deadline = time.monotonic() + limit_s
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self.socket], [], [], max(left, 0))
            if not readable:
                raise CheckError(f"{wanted!r} did not appear within {limit_s} s; last seen:\n{self.seen[-2000:]}")
            data = self.socket.recv(65536)
            if not data:
                raise CheckError(f"closed before {wanted!r} appeared; last seen:\n{self.seen[-2000:]}")
            self.seen += data.decode(errors="replace")
        before, _, self.seen = self.seen.partition(wanted)
        return before + wanted

    def call(self, command, arguments=None):
        """One QMP or guest agent command; returns what it returned, None where it went by without an answer in time."""
        self.send(json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})}) + "\n")
        deadline = time.monotonic() + STEP_LIMIT_S
        while time.monotonic() < deadline:
            answer = json.loads(self.wait("\n"))
            if "error" in answer:
                raise CheckError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]
        raise CheckError(f"{command}: no answer")


def make_seed(directory):
    seed = directory / "seed.img"
    for name, text in (("user-data", USER_DATA), ("meta-data", META_DATA)):
        (directory / name).write_text(text)
    subprocess.run(["mformat", "-C", "-i", seed, "-v", "cidata", "-f", "1440", "::"], check=True)
    subprocess.run(["mcopy", "-i", seed, directory / "user-data", directory / "meta-data", "::"], check=True)
    return seed


def boot_arguments(images, kind, append):
    if kind == "disk":
        return ["-drive", f"file={images}/tiny-disk.qcow2,if=virtio,format=qcow2,snapshot=on"]
    tiny = images / "tiny"
    cmdline = " ".join(filter(None, [(tiny / "cmdline").read_text().strip(), append]))
    return ["-kernel", str(tiny / "kernel"), "-initrd", str(tiny / "initrd"), "-append", cmdline]


def start(images, kind, directory, options):
    unix = lambda name: f"socket,path={directory}/{name},server=on,wait=off"
    argv = ["qemu-system-x86_64", "-accel", options.accel, "-machine", "q35", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]
    argv += boot_arguments(images, kind, options.append)  # first: the BIOS starts the first disk
    argv += ["-chardev", unix("console") + ",id=con", "-serial", "chardev:con"]
    argv += ["-chardev", unix("qmp") + ",id=qmp", "-mon", "chardev=qmp,mode=control"]
    argv += ["-chardev", unix("agent") + ",id=agent", "-device", "virtio-serial"]
    argv += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    argv += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    argv += ["-device", "virtio-balloon", "-device", "virtio-rng-pci"]
    argv += ["-drive", f"file={make_seed(directory)},if=virtio,format=raw,readonly=on"]
    return subprocess.Popen(argv)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check(images, kind, options):
    with tempfile.TemporaryDirectory(prefix="hv-check-") as name:
        directory = Path(name)
        started = time.monotonic()
        qemu = start(images, kind, directory, options)
        try:
            console = Line(directory / "console")
            console.wait("hypervisor-guest: hello from ", BOOT_LIMIT_S)
            figures = f"greeting after {time.monotonic() - started:.1f} s, {cpu_seconds(qemu.pid):.1f} s of CPU"
            greeting = console.wait("s)").strip()
            if not greeting.startswith(NAME):
                raise CheckError(f"the host name of the seed was not applied: {greeting}")
            if not options.boot_only:
                check_inside(console, directory, qemu)
            print(f"image check: {kind}: ok, {figures}, guest says {greeting}", flush=True)
        finally:
            qemu.kill()
            qemu.wait()


def check_inside(console, directory, qemu):
    console.wait("seed instance-id=i-check")
    console.wait("ran-by-seed")
    console.send("\necho $((6*7))-is-the-answer\n")
    console.wait("42-is-the-answer")
    console.send("while ! ip -4 addr show eth0 | grep inet; do sleep 0.2; done\n")
    console.wait("inet 10.0.2.")
    agent = Line(directory / "agent")
    agent.call("guest-ping")
    names = [nic["name"] for nic in agent.call("guest-network-get-interfaces")]
    if "eth0" not in names:
        raise CheckError(f"the guest agent does not know eth0: {names}")
    pid = agent.call("guest-exec", {"path": "/bin/echo", "arg": ["from-agent"], "capture-output": True})["pid"]
    deadline = time.monotonic() + STEP_LIMIT_S
    while not (status := agent.call("guest-exec-status", {"pid": pid}))["exited"]:
        if time.monotonic() > deadline:
            raise CheckError("guest-exec does not end")
    if status.get("exitcode") != 0:
        raise CheckError(f"guest-exec: {status}")
    qmp = Line(directory / "qmp")
    qmp.wait("\n")
    qmp.call("qmp_capabilities")
    qmp.call("system_powerdown")
    console.wait("hypervisor-guest: power button")
    console.wait("hypervisor-guest: poweroff")
    qemu.wait(timeout=STEP_LIMIT_S)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="cache directory that holds images/")
    parser.add_argument("--accel", default="tcg", help="QEMU accelerator")
    parser.add_argument("--append", default="", help="more kernel arguments, for measuring")
    parser.add_argument("--boot-only", action="store_true", help="stop at the greeting")
    parser.add_argument("kind", nargs="*", metavar="directory|disk", help="which image; both where none is named")
    options = parser.parse_args()
    if not (options.cache / "images/tiny/cmdline").is_file():
        raise CheckError(f"no images in {options.cache}/images: run hack/setup.sh images")
    for kind in options.kind or ("directory", "disk"):
        check(options.cache / "images", kind, options)


if __name__ == "__main__":
    try:
        main()
    except (CheckError, subprocess.TimeoutExpired) as problem:
        sys.exit(f"image check: {problem}")
