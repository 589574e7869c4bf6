//! Headers: what is taken, what is refused, and that no bytes whatever make the check fail otherwise.

use proptest::prelude::*;

use super::*;

/// A qcow2 image of version 3 with one cluster for each table.
fn qcow2(virtual_bytes: u64) -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &virtual_bytes.to_be_bytes());
    put(36, &8u32.to_be_bytes());
    put(40, &(3u64 << 16).to_be_bytes());
    put(48, &(1u64 << 16).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    image
}

fn vmdk(descriptor: &str) -> Vec<u8> {
    let mut image = vec![0; 64 << 10];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"KDMV");
    put(12, &2048u64.to_le_bytes());
    put(28, &1u64.to_le_bytes());
    put(36, &20u64.to_le_bytes());
    put(512, descriptor.as_bytes());
    image
}

fn look(image: &[u8]) -> Result<Header, String> {
    classify(image, &image[image.len().saturating_sub(512)..], image.len() as u64)
}

fn refusal(image: &[u8]) -> String {
    look(image).expect_err("it was accepted")
}

#[test]
fn a_plain_qcow2_is_taken_with_its_virtual_size() {
    let header = look(&qcow2(1 << 30)).unwrap();
    assert_eq!(header, Header { format: Format::Qcow2, virtual_bytes: Some(1 << 30) });
}

#[test]
fn a_qcow2_that_needs_another_file_is_refused() {
    let name = br#"json:{"driver":"file","filename":"/etc/shadow"}"#;
    let mut image = qcow2(1 << 20);
    image[8..16].copy_from_slice(&512u64.to_be_bytes());
    image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    image[512..512 + name.len()].copy_from_slice(name);
    let said = refusal(&image);
    assert!(said.contains("depends on another file") && said.contains("json:"), "{said}");

    let mut image = qcow2(1 << 20);
    image[16..20].copy_from_slice(&5u32.to_be_bytes());
    assert!(refusal(&image).contains("depends on another file"));

    let mut image = qcow2(1 << 20);
    image[79] = 0b100;
    assert!(refusal(&image).contains("data in another file"));

    let mut image = qcow2(1 << 20);
    image[104..108].copy_from_slice(&0x4441_5441u32.to_be_bytes());
    assert!(refusal(&image).contains("external data file"));
}

#[test]
fn a_qcow2_that_lies_about_itself_is_refused() {
    let cases: [(usize, &[u8], &str); 8] = [
        (4, &4u32.to_be_bytes(), "version 4"),
        (20, &40u32.to_be_bytes(), "clusters"),
        (24, &u64::MAX.to_be_bytes(), "do not cover"),
        (32, &1u32.to_be_bytes(), "encrypted"),
        (36, &u32::MAX.to_be_bytes(), "tables"),
        (40, &u64::MAX.to_be_bytes(), "tables"),
        (76, &0x8000_0000u32.to_be_bytes(), "not known"),
        (100, &8u32.to_be_bytes(), "length"),
    ];
    for (at, bytes, reason) in cases {
        let mut image = qcow2(1 << 20);
        image[at..at + bytes.len()].copy_from_slice(bytes);
        let said = refusal(&image);
        assert!(said.contains(reason), "{at}: {said}");
    }
    assert!(refusal(&qcow2(1 << 20)[..90]).contains("truncated"));
    assert!(refusal(&qcow2(1 << 20)[..70_000]).contains("truncated"));
}

#[test]
fn a_vmdk_of_one_file_is_taken_and_any_other_refused() {
    let good = "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 2048 SPARSE \"x\"\n";
    assert_eq!(look(&vmdk(good)).unwrap(), Header { format: Format::Vmdk, virtual_bytes: Some(1 << 20) });
    for (from, to) in [
        ("ffffffff", "12345678"),
        ("monolithicSparse", "twoGbMaxExtentFlat"),
        ("\nRW", "\nparentFileNameHint=\"/etc/shadow\"\nRW"),
        ("\nRW", "\nRW 1 FLAT \"/etc/shadow\" 0\nRW"),
    ] {
        let said = refusal(&vmdk(&good.replace(from, to)));
        assert!(said.contains("VMDK"), "{said}");
    }
    let mut only_describes = vmdk(good);
    only_describes[12..20].fill(0);
    assert!(refusal(&only_describes).contains("only describes"));
    let mut far = vmdk(good);
    far[28..36].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(refusal(&far).contains("outside"));
    assert!(refusal(b"# Disk DescriptorFile\nRW 1 FLAT \"/etc/shadow\" 0\n").contains("descriptor"));
}

#[test]
fn a_vhd_is_known_by_its_footer_and_needs_no_parent() {
    let mut image = vec![0; 4096];
    let footer = image.len() - 512;
    image[footer..footer + 8].copy_from_slice(b"conectix");
    image[footer + 48..footer + 56].copy_from_slice(&3584u64.to_be_bytes());
    image[footer + 63] = 2;
    assert_eq!(look(&image).unwrap(), Header { format: Format::Vhd, virtual_bytes: Some(3584) });
    image[footer + 63] = 4;
    assert!(refusal(&image).contains("parent"));
}

#[test]
fn what_is_compressed_or_a_web_page_is_refused_and_the_rest_is_raw() {
    assert!(refusal(b"\x1f\x8b\x08\0\0\0\0\0").contains("gzip"));
    assert!(refusal(b"<!DOCTYPE html>").contains("web page"));
    assert!(refusal(b"").contains("empty"));
    assert_eq!(look(&[7; 1000]).unwrap(), Header { format: Format::Raw, virtual_bytes: Some(1024) });
}

proptest! {
    #[test]
    fn random_bytes_after_a_magic_do_not_panic(
        magic in prop::sample::select(vec![&b"QFI\xfb"[..], b"QFI\xfb\0\0\0\x03", b"KDMV", b"conectix", b"vhdxfile", b""]),
        bytes in prop::collection::vec(any::<u8>(), 0..2048),
    ) {
        let image = [magic, &bytes].concat();
        let _ = look(&image);
    }

    #[test]
    fn a_qcow2_with_damaged_header_is_never_taken_with_a_backing_file(
        damage in prop::collection::vec((0usize..160, any::<u8>()), 0..12),
    ) {
        let mut image = qcow2(1 << 20);
        for (at, byte) in damage {
            image[at] = byte;
        }
        if let Ok(header) = look(&image) && header.format == Format::Qcow2 {
            prop_assert_eq!(be64(&image, 8), Some(0));
            prop_assert_eq!(be32(&image, 16), Some(0));
            prop_assert!(be32(&image, 4) == Some(2) || image[79] & 0b100 == 0);
        }
    }
}
