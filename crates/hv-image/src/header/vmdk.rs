//! VMware's sparse extent (Virtual Disk Format 5.0, "Hosted Sparse Extent Header"): one file with its
//! descriptor inside.

use super::le64;

pub(super) const MAGIC: &[u8] = b"KDMV";

const SECTOR: u64 = 512;
/// Largest embedded descriptor that QEMU reads; it lies in the part of the file that is looked at.
const MAX_DESCRIPTOR_BYTES: u64 = 64 << 10;

/// The virtual size of an image that needs no other file.
pub(super) fn check(head: &[u8], length: u64) -> Result<u64, String> {
    let word = |at| le64(head, at).ok_or("it is truncated: its VMDK header is not complete; fetch it again");
    // Capacity at 12, descriptor's offset at 28 and size at 36, all in sectors.
    let (capacity, offset, size) = (word(12)?, word(28)?, word(36)?);
    if capacity == 0 {
        return Err(
            "it is a VMDK that only describes other files; convert the disk to one file first".to_owned()
        );
    }
    let capacity = capacity.checked_mul(SECTOR).ok_or("its VMDK header is malformed: its capacity")?;
    if offset == 0 {
        return Err("it is a part of a split VMDK; convert the disk to one file first".to_owned());
    }
    let start = offset.checked_mul(SECTOR).filter(|start| *start < length);
    let end = start.zip(size.checked_mul(SECTOR)).and_then(|(start, size)| start.checked_add(size));
    let (Some(start), Some(end)) = (start, end.filter(|end| *end <= length)) else {
        return Err("it is truncated or malformed: its VMDK descriptor lies outside of the file".to_owned());
    };
    if end - start > MAX_DESCRIPTOR_BYTES || end > head.len() as u64 {
        return Err(
            "its VMDK descriptor is not where one is expected; convert the disk with `qemu-img`".to_owned()
        );
    }
    descriptor(&String::from_utf8_lossy(&head[start as usize..end as usize]))?;
    Ok(capacity)
}

fn descriptor(text: &str) -> Result<(), String> {
    let text = text.split('\0').next().unwrap_or_default().to_ascii_lowercase();
    let mut extents = 0;
    for line in text.lines().map(str::trim) {
        let value = |key: &str| {
            line.strip_prefix(key).and_then(|rest| rest.trim_start().strip_prefix('=')).map(str::trim)
        };
        let has_parent = value("parentcid").is_some_and(|cid| cid.trim_matches('"') != "ffffffff");
        if has_parent || line.contains("parentfilenamehint") {
            return Err("it depends on a parent VMDK; flatten it with `qemu-img convert`".to_owned());
        }
        if let Some(kind) = value("createtype")
            && !matches!(kind.trim_matches('"'), "monolithicsparse" | "streamoptimized")
        {
            return Err(format!(
                "it is a VMDK of the type {}, which names other files; convert the disk to one file first",
                hv_types::validate::excerpt(kind.trim_matches('"'))
            ));
        }
        if ["rw ", "rdonly ", "noaccess "].iter().any(|access| line.starts_with(access)) {
            extents += 1;
        }
    }
    match extents {
        0 | 1 => Ok(()),
        _ => Err("it is a VMDK of several files; convert the disk to one file first".to_owned()),
    }
}
