//! `apply`.

use hv_proto::v1::InstanceState;

use crate::fake::{Fake, Script};
use crate::program::{ctl, ctl_with_input};

const DB: &str = "\
kind: Instance
name: db
type: vm
spec: {image: tiny, cpus: 2, memory: 1GiB}
metadata:
  labels: {tier: db}
";

#[test]
fn apply_creates_then_leaves_alone_then_configures() {
    let fake = Fake::start();
    let apply =
        |text: &str, more: &[&str]| ctl_with_input(&fake, &[&["apply", "-f", "-"], more].concat(), text);

    let dry = apply(DB, &["--dry-run"]).ok();
    assert!(dry.starts_with("instance/db would be created:\n"), "{dry}");
    assert!(dry.contains("  + spec.memory_bytes: 1073741824\n"), "{dry}");
    assert!(fake.mutations().is_empty());

    assert_eq!(apply(DB, &[]).ok(), "instance/db created\n");
    assert_eq!(apply(DB, &[]).ok(), "instance/db unchanged\n");

    let changed = DB.replace("tier: db", "tier: web") + "wanted: stopped\n";
    let dry = apply(&changed, &["--dry-run"]).ok();
    assert_eq!(
        dry,
        "instance/db would be configured:\n  ~ metadata.labels.tier: db → web\n  ~ wanted: running → stopped\n"
    );
    assert_eq!(apply(&changed, &[]).ok(), "instance/db configured\n");
    let db = fake.instance("db").unwrap();
    assert_eq!((db.state(), db.metadata.unwrap().labels["tier"].as_str()), (InstanceState::Stopped, "web"));
    assert_eq!(fake.mutations(), ["create", "metadata", "stop"]);

    let json = apply(&changed, &["-o", "json"]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["results"][0]["action"], "unchanged");
}

#[test]
fn an_instance_is_created_paused_by_letting_it_run_first() {
    let fake = Fake::start();
    ctl_with_input(&fake, &["apply", "-f", "-"], &format!("{DB}wanted: paused\n")).ok();
    assert_eq!(fake.mutations(), ["create", "pause"]);
    assert_eq!(fake.instance("db").unwrap().state(), InstanceState::Paused);
}

#[test]
fn nothing_is_done_if_one_document_is_wrong() {
    let fake = Fake::with_instances();
    let text = format!("{DB}---\nkind: Instance\nname: web\nspec: {{image: other}}\n");
    let error = ctl_with_input(&fake, &["apply", "-f", "-"], &text).failed(2);
    assert!(
        error.contains(
            "standard input:8: spec.image: instance web has tiny, which cannot be changed to other"
        ),
        "{error}"
    );
    assert!(fake.mutations().is_empty());

    let twice = format!("{DB}---\n{DB}");
    let error = ctl_with_input(&fake, &["apply", "-f", "-"], &twice).failed(2);
    assert!(error.contains("standard input:8") && error.contains("first in standard input:1"), "{error}");
}

#[test]
fn directories_are_read_in_order_and_half_written_yaml_is_placed() {
    let fake = Fake::start();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("b.yaml"), DB).unwrap();
    std::fs::write(
        path("a.json"),
        r#"{"kind": "Instance", "name": "a", "type": "vm", "spec": {"image": "tiny"}}"#,
    )
    .unwrap();
    std::fs::write(path("notes.txt"), "not read").unwrap();
    let apply = || ctl(&fake, &["apply", "-f", directory.path().to_str().unwrap()]);
    assert_eq!(apply().ok(), "instance/a created\ninstance/db created\n");

    std::fs::write(path("c.yaml"), "kind: Instance\nname: c\nspec: {image: [\n").unwrap();
    let error = apply().failed(2);
    assert!(error.contains("c.yaml:") && !error.contains("c.yaml: "), "{error}");
    ctl(&fake, &["apply", "-f", "/nonexistent.yaml"]).failed(2);
    let empty = tempfile::tempdir().unwrap();
    ctl(&fake, &["apply", "-f", empty.path().to_str().unwrap()]).failed(2);
}

#[test]
fn an_instance_that_fails_ends_apply_with_8() {
    let fake = Fake::start();
    fake.script(Script { failing: Some("no room".into()), ..Default::default() });
    let error = ctl_with_input(&fake, &["apply", "-f", "-"], DB).failed(8);
    assert!(error.contains("no room"), "{error}");
}
