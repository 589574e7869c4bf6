//! OCI images made in code (image-spec 1.1): busybox and a guest that greets, echoes and goes when asked to.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub(crate) const GREETING: &str = "container-guest: hello";
/// Debian's `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";

/// Greets, then echoes what comes until it is told to end. The terminal is raw, so that nothing is echoed twice.
const GUEST: &str = "#!/bin/busybox sh\n\
    trap 'exit 0' TERM\n\
    /bin/busybox stty raw -echo 2>/dev/null\n\
    echo 'container-guest: hello'\n\
    [ \"$1\" = quits ] && exit 0\n\
    exec 3<&0\n\
    /bin/busybox cat <&3 &\n\
    wait $!\n";

const APPLETS: [&str; 23] = [
    "sh", "cat", "echo", "sleep", "id", "ls", "true", "false", "dd", "head", "mount", "mkdir", "touch",
    "stty", "seq", "hostname", "ip", "ping", "tail", "wc", "unshare", "sync", "env",
];

/// Whether it can be made here: the program must stand on its own.
pub(crate) fn has_busybox() -> bool {
    fs::read(BUSYBOX).is_ok_and(|bytes| !needs_loader(&bytes))
}

/// Whether a program names a loader (ELF-64, `PT_INTERP`).
fn needs_loader(program: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let bytes = program.get(at..at + length).unwrap_or_default();
        bytes.iter().rev().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let (headers, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).any(|index| number(headers + index * size, 4) == 3)
}

/// An image in a layout.
pub(crate) struct Made {
    pub(crate) layout: PathBuf,
    pub(crate) manifest: String,
}

/// A layout with the images `guest`, and `quits`, whose guest ends after its greeting.
pub(crate) fn layout(dir: &Path) -> Made {
    let layout = dir.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let mut tar = Vec::new();
    for dir in ["bin/", "etc/", "tmp/", "proc/", "sys/", "dev/", "data/"] {
        entry(&mut tar, dir, b'5', if dir == "tmp/" { 0o1777 } else { 0o755 }, b"", "");
    }
    entry(&mut tar, "bin/busybox", b'0', 0o755, &fs::read(BUSYBOX).unwrap(), "");
    entry(&mut tar, "guest", b'0', 0o755, GUEST.as_bytes(), "");
    for applet in APPLETS {
        entry(&mut tar, &format!("bin/{applet}"), b'2', 0o777, b"", "busybox");
    }
    tar.extend([0; 1024]);
    // A second layer, so that there is a chain.
    let mut top = Vec::new();
    entry(&mut top, "etc/passwd", b'0', 0o644, b"root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n", "");
    top.extend([0; 1024]);
    let layers = [blob(&layout, &tar), blob(&layout, &top)];
    let manifest = |command: &[&str]| {
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Entrypoint": ["/guest"], "Cmd": command, "Env": ["FROM_IMAGE=yes"], "WorkingDir": "/tmp" },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>() },
        });
        let kind = |mut blob: Value, kind: &str| {
            blob["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
            blob
        };
        let config = kind(blob(&layout, config.to_string().as_bytes()), "config.v1+json");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers.iter().map(|layer| kind(layer.clone(), "layer.v1.tar")).collect::<Vec<_>>(),
        });
        kind(blob(&layout, manifest.to_string().as_bytes()), "manifest.v1+json")
    };
    let named = |mut manifest: Value, name: &str| {
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        manifest
    };
    let guest = manifest(&[]);
    let index = json!({
        "schemaVersion": 2,
        "manifests": [named(guest.clone(), "guest"), named(manifest(&["quits"]), "quits")],
    });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    Made { layout, manifest: guest["digest"].as_str().unwrap().to_owned() }
}

fn blob(layout: &Path, bytes: &[u8]) -> Value {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(layout.join("blobs/sha256").join(&hex), bytes).unwrap();
    json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

/// An entry of a tar archive (POSIX ustar).
fn entry(tar: &mut Vec<u8>, name: &str, kind: u8, mode: u32, content: &[u8], link: &str) {
    let mut header = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", content.len()).as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend(header);
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}
