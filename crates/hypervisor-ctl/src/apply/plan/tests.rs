//! Documents against instances: what is read, what is planned, what is refused.

use super::*;
use crate::apply::document::parse;

const WEB: &str = "\
kind: Instance
name: web
type: vm
wanted: stopped
spec: {image: debian-13, cpus: 2, memory: 1GiB}
metadata:
  labels: {tier: web, new: x}
";

fn document(text: &str) -> Desired {
    parse("web.yaml", text).unwrap().remove(0)
}

fn web() -> v1::Instance {
    v1::Instance {
        id: "id-1".into(),
        name: "web".into(),
        r#type: v1::InstanceType::Vm as i32,
        state: InstanceState::Running as i32,
        wanted: InstanceWanted::Running as i32,
        spec: Some(v1::InstanceSpec {
            image: "debian-13".into(),
            cpu_cores: 2,
            memory_bytes: 1 << 30,
            ..Default::default()
        }),
        metadata: Some(v1::Metadata {
            labels: [("tier", "db"), ("old", "y")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            annotations: [("note".to_owned(), "kept".to_owned())].into(),
        }),
        ..Default::default()
    }
}

#[test]
fn labels_and_what_is_wanted_change_and_annotations_that_are_not_given_stay() {
    let plan = plan(&document(WEB), Some(&web())).unwrap();
    assert_eq!(
        plan.changes,
        [
            "+ metadata.labels.new: x",
            "~ metadata.labels.tier: db → web",
            "- metadata.labels.old: y",
            "~ wanted: running → stopped"
        ]
    );
    assert_eq!(plan.metadata.unwrap().annotations["note"], "kept");
    assert_eq!(plan.verbs, [stop()]);
    assert!(!plan.create);
}

#[test]
fn an_instance_that_is_as_it_should_be_is_unchanged() {
    let text = WEB.replace("stopped", "running").replace("{tier: web, new: x}", "{tier: db, old: 'y'}");
    assert!(plan(&document(&text), Some(&web())).unwrap().is_empty());
}

#[test]
fn another_value_of_a_fixed_field_is_refused_with_its_name_and_the_remedy() {
    for (from, to, field) in [
        ("debian-13", "debian-12", "spec.image"),
        ("cpus: 2", "kernel: other", "spec.kernel"),
        ("type: vm", "type: container", "type"),
    ] {
        let error = plan(&document(&WEB.replace(from, to)), Some(&web())).unwrap_err().to_string();
        assert!(error.starts_with(&format!("web.yaml:1: {field}: ")), "{error}");
        assert!(error.contains("hypervisor-ctl instance delete web"), "{error}");
    }
}

#[test]
fn cores_memory_and_disks_change_and_disks_never_shrink() {
    let mut existing = web();
    let disk = |name: &str, mib: i64| v1::DiskSpec {
        name: name.into(),
        size_bytes: mib << 20,
        ..Default::default()
    };
    existing.spec.as_mut().unwrap().disks = vec![disk("data", 64), disk("old", 1)];
    let spec = "cpus: 4, memory: 2GiB, disks: [{name: data, size: 128MiB}, {name: more, size: 1MiB}]";
    let text = WEB.replace("cpus: 2, memory: 1GiB", spec);
    let update = plan(&document(&text), Some(&existing)).unwrap().update.unwrap();
    assert_eq!((update.cpu_cores, update.memory_bytes), (Some(4), Some(2 << 30)));
    assert_eq!(update.set_disks, [disk("data", 128), disk("more", 1)]);
    assert_eq!(update.remove_disks, ["old"]);
    let smaller = plan(&document(&text.replace("128MiB", "32MiB")), Some(&existing)).unwrap_err().to_string();
    assert!(smaller.contains("disk data has ") && smaller.contains("disks cannot shrink"), "{smaller}");
}

#[test]
fn a_creation_shows_every_field_and_is_checked_as_the_server_would() {
    let creation = plan(&document(WEB), None).unwrap();
    assert!(creation.create && creation.verbs == [stop()]);
    for line in ["+ spec.image: debian-13", "+ spec.memory_bytes: 1073741824", "+ wanted: stopped"] {
        assert!(creation.changes.iter().any(|change| change == line), "{line}: {:?}", creation.changes);
    }
    let error = plan(&document(&WEB.replace("cpus: 2", "cpus: 0")), None).unwrap_err().to_string();
    assert!(error.starts_with("web.yaml:1: spec.cpu_cores must be between 1"), "{error}");
}

#[test]
fn every_way_to_what_is_wanted_is_known() {
    use {InstanceState as S, InstanceWanted as W};
    let path = |wanted: Wanted, now: W, state: S| {
        verbs(wanted, &v1::Instance { wanted: now as i32, state: state as i32, ..Default::default() })
    };
    assert_eq!(path(Wanted::Running, W::Stopped, S::Stopped), [Verb::Start]);
    assert_eq!(path(Wanted::Running, W::Running, S::Failed), [Verb::Start], "a failed one is started again");
    assert_eq!(path(Wanted::Running, W::Running, S::Pending), []);
    assert_eq!(path(Wanted::Running, W::Paused, S::Paused), [Verb::Resume]);
    assert_eq!(path(Wanted::Paused, W::Running, S::Running), [Verb::Pause]);
    assert_eq!(path(Wanted::Paused, W::Stopped, S::Stopped), [Verb::Start, Verb::Pause]);
    assert_eq!(path(Wanted::Stopped, W::Paused, S::Paused), [stop()]);
}

#[test]
fn an_instance_that_is_being_deleted_is_left_alone() {
    let deleted = v1::Instance { wanted: InstanceWanted::Deleted as i32, ..web() };
    let error = plan(&document(WEB), Some(&deleted)).unwrap_err();
    assert_eq!(error.exit_code(), crate::exit_code::PRECONDITION);
}

#[test]
fn both_spellings_and_several_documents_are_read() {
    let text = "\
kind: Instance
name: a
type: INSTANCE_TYPE_VM
preferredNodeId: node-1
spec:
  kernel: vmlinuz
  kernelArgs: console=ttyS0
  cpuCores: 1
  memoryBytes: \"536870912\"
  disks: [{name: data, sizeBytes: \"1024\"}, {name: more, size: 1GiB}]
---
{\"kind\": \"Instance\", \"name\": \"b\", \"type\": \"container\", \"spec\": {\"image\": \"x\", \"memory_bytes\": 1048576}}
---
";
    let documents = parse("x", text).unwrap();
    let names: Vec<&str> = documents.iter().map(|document| document.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let spec = documents[0].request.spec.clone().unwrap();
    assert_eq!((spec.memory_bytes, spec.kernel_args.as_str()), (512 << 20, "console=ttyS0"));
    assert_eq!(spec.disks.iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [1024, 1 << 30]);
    assert_eq!(documents[0].request.preferred_node_id, "node-1");
    assert_eq!(documents[1].place, "x:12");
}

#[test]
fn what_get_prints_can_be_applied_and_changes_nothing() {
    let yaml =
        serde_saphyr::to_string(&v1::Instance { generation: 3, observed_generation: 3, epoch: 1, ..web() });
    let text = format!("kind: Instance\n{}", yaml.unwrap());
    let plan = plan(&document(&text), Some(&web())).unwrap();
    assert!(plan.is_empty(), "{:?}\n{text}", plan.changes);
}

#[test]
fn mistakes_are_named_with_file_line_and_field() {
    for (text, place, needle) in [
        ("kind: Instance\nname: web\nspec:\n  imge: x\n", "f:4:3: ", "imge"),
        ("kind: Instance\nname: [a\n", "f:2:", "name: [a"),
        ("kind: Instance\nname: \"a\n", "f:2:", "unclosed quote"),
        (
            "kind: Instance\nspec: {cpus: two}\n",
            "f:2:",
            "expected a whole number; found \"spec: {cpus: two}\"",
        ),
        ("kind: Instance\nname: web\nspec: {memory: 512}\n", "f:3:", "512MiB"),
        ("kind: Instance\nspec: {memory: 512MB}\n", "f:2:", "512MB"),
        ("name: web\n", "f:1: ", "kind: Instance"),
        ("kind: Network\n", "f:1:", "Network"),
        ("kind: Instance\nwanted: gone\n", "f:2:", "gone"),
        ("- a\n", "f:1:", "kind: Instance"),
        ("kind: Instance\nname: a\nname: b\n", "f:3:", "name"),
        ("kind: Instance\nspec: {memory: 1GiB, memory_bytes: 5}\n", "f:1: ", "memory_bytes"),
    ] {
        let error = parse("f", text).unwrap_err().to_string();
        assert!(error.starts_with(place) && error.contains(needle), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
