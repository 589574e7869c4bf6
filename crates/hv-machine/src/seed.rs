//! cloud-init's NoCloud seed: a small FAT volume labelled `CIDATA`.
//!
//! The layout is cloud-init's "NoCloud" data source: a volume of that label with `meta-data` and `user-data`.

use std::io::{self, Cursor, Write as _};

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use hv_types::InstanceId;

/// Bytes of the volume beside the user data: tables, directory, meta data.
const OVERHEAD_BYTES: usize = 256 << 10;

/// The volume for an instance.
///
/// # Errors
/// If the volume cannot be made of what the instance is given.
pub fn volume(id: &InstanceId, name: &str, user_data: &str) -> io::Result<Vec<u8>> {
    let size = (OVERHEAD_BYTES + user_data.len()).next_multiple_of(64 << 10);
    let mut bytes = vec![0; size];
    // A stable number, so that the same instance has the same volume.
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat12)
        .volume_id(0x4876_5365)
        .volume_label(*b"CIDATA     ");
    format_volume(Cursor::new(&mut bytes), options)?;
    let volume = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new())?;
    let root = volume.root_dir();
    root.create_file("meta-data")?.write_all(meta_data(id, name).as_bytes())?;
    root.create_file("user-data")?.write_all(user_data.as_bytes())?;
    drop(root);
    volume.unmount()?;
    Ok(bytes)
}

/// One key a line, for readers simpler than cloud-init. A JSON string is a YAML string, and quotes whatever a name
/// contains.
fn meta_data(id: &InstanceId, name: &str) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    format!("instance-id: {}\nlocal-hostname: {}\n", quoted(id.as_str()), quoted(name))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_volume_carries_what_cloud_init_looks_for() {
        for user_data in [String::new(), "#cloud-config\nhostname: ü\n".to_owned(), "x".repeat(256 << 10)] {
            let id: InstanceId = "seeded".parse().unwrap();
            let mut bytes = volume(&id, "a\"b, c", &user_data).unwrap();
            let volume = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).unwrap();
            assert_eq!(volume.volume_label(), "CIDATA");
            let read = |name: &str| {
                let mut text = String::new();
                volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
                text
            };
            assert_eq!(read("user-data"), user_data);
            assert_eq!(read("meta-data"), "instance-id: \"seeded\"\nlocal-hostname: \"a\\\"b, c\"\n");
        }
    }
}
