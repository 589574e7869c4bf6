//! QEMU's copy-on-write format (docs/interop/qcow2.txt of QEMU): what its header may say.

use super::{be32, be64};

pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// Incompatible features (header offset 72): dirty, compression type and extended L2 entries are harmless.
const HARMLESS_FEATURES: u64 = 1 | 1 << 3 | 1 << 4;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Header extension with the name of an external data file.
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
/// Most header extensions that are read.
const MAX_EXTENSIONS: usize = 64;
/// Largest L1 table that QEMU itself accepts, in bytes (`QCOW_MAX_L1_SIZE`).
const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest backing file name (header offset 16).
const MAX_BACKING_NAME: usize = 1023;

/// The virtual size of an image that needs no other file and whose tables lie inside of it.
pub(super) fn check(head: &[u8], length: u64) -> Result<u64, String> {
    let word = |at| be64(head, at).ok_or_else(truncated);
    let half = |at| be32(head, at).ok_or_else(truncated);
    let version = half(4)?;
    if !matches!(version, 2 | 3) {
        return Err(format!("it is a qcow2 image of version {version}; convert it to version 3"));
    }
    if word(8)? != 0 || half(16)? != 0 {
        return Err(backing(head, word(8)?, half(16)?));
    }
    let cluster_bits = half(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err("its qcow2 header is malformed: the size of clusters".to_owned());
    }
    if half(32)? != 0 {
        return Err("it is encrypted; decrypt it with `qemu-img convert`".to_owned());
    }
    let inside = |offset: u64, bytes: u64| offset.checked_add(bytes).is_some_and(|end| end <= length);
    let size = word(24)?;
    let l1_bytes = u64::from(half(36)?) * 8;
    let refcount_bytes = u64::from(half(56)?) << cluster_bits;
    if l1_bytes > MAX_L1_BYTES || !inside(word(40)?, l1_bytes) || !inside(word(48)?, refcount_bytes) {
        return Err(
            "it is truncated or malformed: its tables lie outside of the file; fetch it again".to_owned()
        );
    }
    // An L1 entry covers a cluster of 8-byte entries for a cluster each, or 16-byte entries with extended L2.
    let features = if version >= 3 { word(72)? } else { 0 };
    let entry_bits = if features & (1 << 4) != 0 { 4 } else { 3 };
    let covered = u128::from(l1_bytes / 8) << (2 * cluster_bits - entry_bits);
    if u128::from(size) > covered {
        return Err("its qcow2 header is malformed: its tables do not cover its size".to_owned());
    }
    if version >= 3 {
        check_features(features)?;
        check_extensions(head, half(100)? as usize)?;
    }
    Ok(size)
}

fn truncated() -> String {
    "it is truncated: its qcow2 header is not complete; fetch it again".to_owned()
}

fn backing(head: &[u8], offset: u64, length: u32) -> String {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = start.saturating_add((length as usize).min(MAX_BACKING_NAME));
    let name = String::from_utf8_lossy(head.get(start..end).unwrap_or_default()).into_owned();
    let name = hv_types::validate::excerpt(&name);
    format!("it depends on another file, {name}; flatten it with `qemu-img convert -O qcow2`")
}

fn check_features(features: u64) -> Result<(), String> {
    if features & EXTERNAL_DATA != 0 {
        return Err(
            "it keeps its data in another file; flatten it with `qemu-img convert -O qcow2`".to_owned()
        );
    }
    if features & CORRUPT != 0 {
        return Err("it is marked as corrupt; repair it with `qemu-img check -r all`".to_owned());
    }
    match features & !HARMLESS_FEATURES {
        0 => Ok(()),
        unknown => Err(format!("it uses features of qcow2 that are not known here: {unknown:#x}")),
    }
}

fn check_extensions(head: &[u8], header_length: usize) -> Result<(), String> {
    if !(104..=4096).contains(&header_length) {
        return Err("its qcow2 header is malformed: its length".to_owned());
    }
    let mut at = header_length;
    for _ in 0..MAX_EXTENSIONS {
        let kind = be32(head, at).ok_or_else(truncated)?;
        let length = be32(head, at + 4).ok_or_else(truncated)?;
        match kind {
            0 => return Ok(()),
            EXTENSION_DATA_FILE => {
                return Err(
                    "it names an external data file; flatten it with `qemu-img convert -O qcow2`".to_owned()
                );
            }
            _ => at += 8 + (length as usize).next_multiple_of(8).min(head.len()),
        }
    }
    Err("its qcow2 header is malformed: it has too many extensions".to_owned())
}
