//! Images: fetched, sent, shown, removed.

use hv_proto::v1;

use crate::fake::Fake;
use crate::program::ctl;

#[test]
fn a_pull_tells_how_far_it_is_and_then_what_came_of_it() {
    let fake = Fake::start();
    let pull = ["image", "pull", "--type", "container", "oci://registry/tiny:1"];
    let ran = ctl(&fake, &pull);
    assert!(ran.stderr.contains("node-a-id: downloading 50 % of 10 MiB"), "{ran:?}");
    assert_eq!(ran.ok(), "image oci://registry/tiny:1 is on 2 nodes\n");
    let last: v1::PullImageProgress =
        serde_json::from_str(&ctl(&fake, &[&pull[..], &["-o", "json"]].concat()).ok()).unwrap();
    assert!(last.completed);
    let why = ctl(&fake, &["image", "pull", "--type", "vm", "oci://registry/absent:1"]).failed(5);
    assert!(why.contains("oci://registry/absent:1") && why.contains("does not have it"), "{why}");
    let begun = ctl(&fake, &[&pull[..], &["--no-wait"]].concat()).ok();
    assert!(begun.contains("operation watch pull-1"), "{begun}");
    let ran = ctl(&fake, &["image", "pull", "--type", "vm", "oci://registry/shaky:1"]);
    assert!(ran.stderr.contains("the pull goes on without it"), "{ran:?}");
    assert_eq!(ran.ok(), "image oci://registry/shaky:1 is on 2 nodes\n");
    // What it is for cannot be guessed.
    ctl(&fake, &["image", "pull", "oci://registry/tiny:1"]).failed(2);
}

#[test]
fn a_file_is_sent_whole() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    std::fs::write(&file, vec![7; 700_001]).unwrap();
    let path = file.to_str().unwrap();
    let push = ["image", "push", path, "--type", "vm", "--name", "tiny", "--node", "alpha"];
    assert_eq!(ctl(&fake, &push).ok(), "image tiny is on node alpha\n");
    let image: v1::Image =
        serde_json::from_str(&ctl(&fake, &[&push[..], &["-o", "json"]].concat()).ok()).unwrap();
    assert_eq!(image.size_bytes, 700_001);
    let absent = ["image", "push", "absent.raw", "--type", "vm", "--name", "x", "--node", "alpha"];
    let why = ctl(&fake, &absent).failed(2);
    assert!(why.contains("cannot read absent.raw"), "{why}");
}

#[test]
fn an_image_is_shown_with_its_origin_and_its_users() {
    let fake = Fake::start();
    let text = ctl(&fake, &["image", "inspect", "tiny"]).ok();
    for part in ["sha256:0011", "oci://registry/tiny:1", "amd64", "disk", "node-a-id"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(ctl(&fake, &["image", "inspect", "tiny", "-o", "name"]).ok(), "image/tiny\n");
    ctl(&fake, &["image", "inspect", "absent"]).failed(3);
}

#[test]
fn what_stays_on_a_node_is_said() {
    let fake = Fake::start();
    assert_eq!(ctl(&fake, &["image", "delete", "tiny"]).ok(), "image tiny is removed from 1 node\n");
    let why = ctl(&fake, &["image", "delete", "used"]).failed(5);
    assert!(why.contains("node-b-id") && why.contains("in use by 1 instance"), "{why}");
}

#[test]
fn unused_images_are_named_before_they_go() {
    let fake = Fake::start();
    let text = ctl(&fake, &["image", "gc", "--dry-run"]).ok();
    assert!(text.contains("old") && text.contains("3MiB"), "{text}");
    let none = ctl(&fake, &["image", "gc", "--unused-for", "1m"]);
    assert!(none.stderr.contains("nothing to remove"), "{none:?}");
    none.ok();
}
