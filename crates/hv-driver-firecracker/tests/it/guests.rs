//! The bare-metal guests, built from `guests/` with gcc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bare metal: no libc, no vector registers, one segment at 1 MiB.
const FLAGS: [&str; 16] = [
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,--no-warn-rwx-segments",
];

/// The ELF file of a guest, built anew if it is older than its sources. The error says why it cannot be.
pub(crate) fn guest(name: &str) -> Result<PathBuf, String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("firecracker-guests");
    fs::create_dir_all(&dir).unwrap();
    let built = dir.join(format!("{name}.elf"));
    let modified = |path: &Path| fs::metadata(path).ok()?.modified().ok();
    let newest = fs::read_dir(&sources).unwrap().filter_map(|entry| modified(&entry.unwrap().path())).max();
    if modified(&built) > newest {
        return Ok(built);
    }
    let partial = tempfile::Builder::new().prefix(name).tempfile_in(&dir).unwrap().into_temp_path();
    let source = |file: &str| sources.join(file);
    let output = Command::new("gcc")
        .args(FLAGS)
        .arg(format!("-Wl,-T,{}", source("link.ld").display()))
        .args([source("start.S"), source("memory.c"), source(&format!("{name}.c"))])
        .arg("-o")
        .arg(&partial)
        .output()
        .map_err(|e| format!("gcc cannot be run ({e}); apt-get install gcc"))?;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    partial.persist(&built).unwrap();
    Ok(built)
}
