//! References: what is read, what is refused, and that no text whatever makes the parser fail otherwise.

use proptest::prelude::*;

use super::*;

const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn every_kind_reads_back_as_it_is_shown() {
    let pinned = format!("oci://127.0.0.1:5000/a/b_c.d-e:v1.0@sha256:{HEX}");
    let web = format!("https://host.example/disk.qcow2#sha256:{HEX}");
    for text in [
        "oci://registry.example/busybox:1.36",
        "oci://[::1]:5000/x:latest",
        &pinned,
        &web,
        "http://10.0.0.1:8080/a?b=c",
        "file:///var/images/disk.raw",
    ] {
        let reference = Reference::parse(text).unwrap();
        assert_eq!(reference.to_string(), text);
        assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
    }
}

#[test]
fn a_registry_reference_without_tag_and_digest_is_the_latest() {
    assert_eq!(Reference::parse("oci://r/x").unwrap().to_string(), "oci://r/x:latest");
    let pinned = format!("oci://r/x@sha256:{HEX}");
    assert_eq!(Reference::parse(&pinned).unwrap().to_string(), pinned);
}

#[test]
fn what_could_lead_elsewhere_is_refused() {
    for text in [
        "",
        "busybox",
        "docker://r/x",
        "oci://r",
        "oci:///x",
        "oci://r/",
        "oci://r/../x",
        "oci://r/a//b",
        "oci://r/X",
        "oci://r/x:",
        "oci://r/x:.a",
        "oci://r/x:a/b",
        "oci://user@r/x",
        "oci://r:0/x",
        "oci://r:99999/x",
        "oci://r:+5/x",
        "oci://r/x@sha256:short",
        "oci://r/x@md5:d41d8cd98f00b204e9800998ecf8427e",
        "oci://r/a___b",
        "oci://r/a-",
        "https://host",
        "https://host/",
        "https://user:secret@host/file",
        "https://host/file#md5:1",
        "http://",
        "file://relative",
        "file:///a/../etc/shadow",
        "file:///",
        "file:///a%2fb",
        "oci://r/x y",
        "oci://r/x\n",
    ] {
        let error = Reference::parse(text).expect_err(text).to_string();
        assert!(error.len() < 400 && !error.contains('\n'), "{error}");
    }
    assert!(Reference::parse(&format!("oci://r/{}", "a".repeat(600))).is_err());
}

proptest! {
    #[test]
    fn no_text_panics_and_what_is_read_reads_back(text in "(oci|https|http|file)://[ -~]{0,80}") {
        if let Ok(reference) = Reference::parse(&text) {
            prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
        }
    }

    #[test]
    fn arbitrary_texts_do_not_panic(text in ".*") {
        let _ = Reference::parse(&text);
    }

    #[test]
    fn a_repository_never_climbs(text in "[a-z0-9._/-]{1,40}") {
        if let Ok(reference) = Reference::parse(&format!("oci://r/{text}")) {
            let shown = reference.to_string();
            prop_assert!(!shown.contains("..") && !shown[6..].contains("//"), "{}", shown);
        }
    }
}
