//! What reads: lists, descriptions, events, versions, references.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use hv_proto::v1::{self, InstanceState};

use crate::fake::{Fake, Script};
use crate::program::{against, alone, command, ctl};

#[test]
fn instances_are_listed_over_all_pages_with_short_ids() {
    let fake = Fake::with_instances();
    fake.model.lock().add(
        "0290a1b2-c3d4-7000-8000-000000000003",
        "db",
        v1::InstanceType::Vm,
        InstanceState::Failed,
    );
    let text = ctl(&fake, &["instance", "list"]).ok();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "NAME", "TYPE", "STATE", "NODE", "IP", "AGE"]);
    assert_eq!(rows[1][..5], ["0190a1b2-c3d4-70", "web", "vm", "RUNNING", "node-a-id"]);
    assert_eq!(rows[2][1..4], ["job", "container", "STOPPED"]);
    assert_eq!(rows[3][1..4], ["db", "vm", "FAILED"]);
    assert!(!text.contains('\u{1b}'), "no colours in a pipe");
}

#[test]
fn the_noun_and_the_flags_filter_a_list() {
    let fake = Fake::with_instances();
    let names = |arguments: &[&str]| ctl(&fake, arguments).ok();
    assert_eq!(names(&["vm", "list", "-o", "name"]), "vm/web\n");
    assert_eq!(names(&["container", "list", "-o", "name"]), "container/job\n");
    assert_eq!(names(&["instance", "list", "--type", "vm", "-o", "name"]), "vm/web\n");
    assert_eq!(names(&["instance", "list", "-l", "tier=job", "-o", "name"]), "instance/job\n");
    assert_eq!(names(&["instance", "list", "-l", "tier", "-o", "name"]), "instance/web\ninstance/job\n");
    assert_eq!(names(&["instance", "list", "--state", "stopped", "-o", "name"]), "instance/job\n");
    assert_eq!(names(&["instance", "list", "--node", "alpha", "-o", "name"]), "instance/web\ninstance/job\n");
    assert_eq!(names(&["instance", "list", "--node", "beta", "-o", "name"]), "");
    let contradiction = ctl(&fake, &["vm", "list", "--type", "container"]).failed(2);
    assert!(contradiction.contains("contradict"), "{contradiction}");
}

#[test]
fn json_and_yaml_are_the_messages_of_the_api() {
    let fake = Fake::with_instances();
    let list: v1::ListInstancesResponse =
        serde_json::from_str(&ctl(&fake, &["instance", "list", "-o", "json"]).ok()).unwrap();
    assert_eq!((list.instances.len(), list.total_count, list.revision), (2, 2, 7));
    let one: v1::Instance =
        serde_json::from_str(&ctl(&fake, &["vm", "get", "web", "-o", "json"]).ok()).unwrap();
    assert_eq!(one, fake.instance("web").unwrap());
    let yaml = ctl(&fake, &["instance", "get", "web", "-o", "yaml"]).ok();
    let one: v1::Instance = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(one, fake.instance("web").unwrap(), "{yaml}");
    let wide = ctl(&fake, &["instance", "get", "web", "-o", "wide"]).ok();
    assert!(wide.contains("IMAGE") && wide.contains("512MiB") && wide.contains("tier=web"), "{wide}");
}

#[test]
fn a_name_an_id_and_the_beginning_of_an_id_are_understood() {
    let fake = Fake::with_instances();
    for reference in
        ["web", "0190a1b2-c3d4-7000-8000-000000000001", "0190a1b2-c3d4-70", "instance/web", "vm/web"]
    {
        assert_eq!(
            ctl(&fake, &["instance", "get", reference, "-o", "name"]).ok(),
            "instance/web\n",
            "{reference}"
        );
    }
    let ambiguous = ctl(&fake, &["instance", "get", "0190a1b2"]).failed(2);
    for candidate in ["000000000001  web", "000000000002  job"] {
        assert!(ambiguous.contains(candidate), "{ambiguous}");
    }
    let missing = ctl(&fake, &["instance", "get", "nobody"]).failed(3);
    assert!(missing.contains("no instance is called \"nobody\""), "{missing}");
    // A container is no vm.
    ctl(&fake, &["vm", "get", "job"]).failed(3);
    ctl(&fake, &["node", "get", "nobody"]).failed(3);
}

#[test]
fn control_characters_of_others_do_not_reach_the_terminal() {
    let fake = Fake::with_instances();
    {
        let mut model = fake.model.lock();
        let web = model.instances.values_mut().next().unwrap();
        web.state_reason = "\u{1b}]0;owned\u{7}\nnext".into();
    }
    for arguments in [&["instance", "list", "-o", "wide"][..], &["instance", "describe", "web"]] {
        let text = ctl(&fake, arguments).ok();
        assert!(text.contains("\\u{1b}]0;owned\\u{7}\\nnext") && !text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn descriptions_name_the_node_and_end_with_events() {
    let fake = Fake::with_instances();
    let event = v1::Event {
        id: "e1".into(),
        object_kind: "instance".into(),
        object_id: "0190a1b2-c3d4-7000-8000-000000000001".into(),
        object_name: "web".into(),
        reason: "Scheduled".into(),
        message: "bound to alpha".into(),
        ..Default::default()
    };
    fake.model.lock().events.push(event);
    let text = ctl(&fake, &["instance", "describe", "web"]).ok();
    for part in
        ["Name:", "alpha (node-a-id)", "1 (settled", "Memory:", "512MiB", "Scheduled", "bound to alpha"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = ctl(&fake, &["node", "describe", "alpha"]).ok();
    for part in ["READY", "10.0.0.1:50052", "8 cores, 16GiB memory", "web", "RUNNING"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn events_are_printed_oldest_first_and_once_in_a_watch() {
    let fake = Fake::with_instances();
    for (id, reason, warning) in [("e1", "Created", false), ("e2", "Failed", true)] {
        let event = v1::Event {
            id: id.into(),
            reason: reason.into(),
            warning,
            object_kind: "instance".into(),
            ..Default::default()
        };
        fake.model.lock().events.push(event);
    }
    let text = ctl(&fake, &["events"]).ok();
    assert!(text.find("Created").unwrap() < text.find("Failed").unwrap(), "{text}");
    assert!(!ctl(&fake, &["events", "--warnings"]).ok().contains("Created"));
    assert_eq!(ctl(&fake, &["events", "--tail", "1", "-o", "name"]).ok(), "event/e2\n");

    // The fake's watch repeats the last event of the list before it brings a new one, and then ends.
    let mut child = against(&fake)
        .args(["events", "--watch", "-o", "name"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let printed: Vec<String> = lines.take(3).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(printed, ["event/e1", "event/e2", "event/e9"]);

    ctl(&fake, &["events", "--for", "instance/nobody"]).failed(3);
    ctl(&fake, &["events", "--for", "web"]).failed(2);
}

#[test]
fn nodes_images_and_the_cluster_are_shown() {
    let fake = Fake::start();
    let nodes = ctl(&fake, &["node", "list"]).ok();
    assert!(nodes.contains("alpha") && nodes.contains("0/8") && nodes.contains("READY"), "{nodes}");
    assert_eq!(ctl(&fake, &["node", "list", "-o", "name"]).ok(), "node/alpha\nnode/beta\n");
    let list: v1::ListNodesResponse =
        serde_json::from_str(&ctl(&fake, &["nodes", "ls", "-o", "json"]).ok()).unwrap();
    assert_eq!(list.nodes.len(), 2);
    let info = ctl(&fake, &["cluster", "info"]).ok();
    assert!(info.contains("9.9.9") && info.contains("1 of 2 ready"), "{info}");
    let images = ctl(&fake, &["image", "list"]).ok();
    assert!(images.contains("tiny") && images.contains("5MiB") && images.contains("ARCH"), "{images}");
    let images = ctl(&fake, &["image", "list", "-o", "wide"]).ok();
    assert!(images.contains("DIGEST") && images.contains("node-a-id"), "{images}");
}

#[test]
fn a_watch_of_a_list_prints_what_there_is_as_one_table() {
    let fake = Fake::start();
    // The fake's watch of nodes ends with a refusal, so that this ends.
    let ran = ctl(&fake, &["node", "list", "--watch"]);
    assert_eq!(ran.stdout.lines().count(), 3, "{ran:?}");
    assert!(ran.stderr.contains("the fake's watch is over"), "{ran:?}");
}

#[test]
fn a_watch_of_one_instance_ends_with_its_deletion() {
    let fake = Fake::with_instances();
    let mut child = against(&fake)
        .args(["instance", "get", "web", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.by_ref().take(2).any(|line| line.contains("RUNNING")));
    let id = fake.instance("web").unwrap().id;
    fake.model.lock().remove(&id);
    let rest: Vec<String> = lines.collect();
    assert!(rest.len() == 1 && rest[0].contains("web") && rest[0].contains("DELETED"), "{rest:?}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn statistics_and_logs_are_printed() {
    let fake = Fake::with_instances();
    let stats = ctl(&fake, &["instance", "stats", "web", "job"]).ok();
    assert!(stats.contains("12.3%") && stats.contains("100MiB") && stats.lines().count() == 3, "{stats}");
    assert_eq!(ctl(&fake, &["instance", "logs", "web", "--tail", "5"]).ok(), "tail 5 follow false\n");
}

#[test]
fn the_version_needs_no_server_and_no_settings() {
    let text = alone(&["version"]).ok();
    assert_eq!(text, format!("hypervisor-ctl {}\n", env!("CARGO_PKG_VERSION")));
    let broken = command().args(["version"]).env("HYPERVISOR_CTL_TIMEOUT", "nonsense").output().unwrap();
    assert!(broken.status.success());
    let fake = Fake::start();
    let text = ctl(&fake, &["version", "--server-version"]).ok();
    assert!(text.contains("hypervisor-server 9.9.9"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&alone(&["version", "-o", "json"]).ok()).unwrap();
    assert_eq!(json["client"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_read_whose_answer_is_lost_is_tried_again() {
    let fake = Fake::start();
    fake.script(Script { lost_answers: 2, ..Default::default() });
    ctl(&fake, &["cluster", "info"]).ok();
    fake.script(Script { lost_answers: 100, ..Default::default() });
    ctl(&fake, &["cluster", "info"]).failed(6);
}
