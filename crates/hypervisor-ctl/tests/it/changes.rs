//! What changes: create, start, stop, delete and the like, and waiting for it.

use std::time::{Duration, Instant};

use hv_proto::v1::{InstanceState, InstanceWanted};

use crate::fake::{Fake, Script};
use crate::program::{ctl, ctl_with_input};

const CREATE: [&str; 5] = ["vm", "create", "db", "--image", "tiny"];

#[test]
fn create_waits_until_the_instance_runs_and_says_where() {
    let fake = Fake::start();
    let ran = ctl(&fake, &CREATE);
    assert!(ran.stdout.starts_with("instance db is RUNNING on node node-a-id"), "{ran:?}");
    assert_eq!(ran.code, 0);
    let db = fake.instance("db").unwrap();
    let spec = db.spec.unwrap();
    assert_eq!((spec.cpu_cores, spec.memory_bytes), (1, 512 << 20));
}

#[test]
fn every_flag_of_create_reaches_the_server() {
    let fake = Fake::start();
    let arguments = [
        "instance",
        "create",
        "--name",
        "db",
        "--type",
        "vm",
        "--image",
        "tiny",
        "--cpus",
        "2",
        "--memory",
        "1024",
        "--disk",
        "name=data,size=1GiB",
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--kernel-args",
        "-x y",
        "--user-data",
        "-",
        "--label",
        "a=b",
        "--annotation",
        "n=x,y",
        "--node",
        "beta",
        "--no-wait",
        "-o",
        "json",
    ];
    ctl_with_input(&fake, &arguments, "#cloud-config\n").ok();
    let db = fake.instance("db").unwrap();
    let (spec, metadata) = (db.spec.unwrap(), db.metadata.unwrap());
    assert_eq!((spec.cpu_cores, spec.memory_bytes, spec.disks[0].size_bytes), (2, 1 << 30, 1 << 30));
    assert_eq!((spec.kernel.as_str(), spec.initrd.as_str(), spec.kernel_args.as_str()), ("k", "i", "-x y"));
    assert_eq!(spec.user_data, "#cloud-config\n");
    assert_eq!((metadata.labels["a"].as_str(), metadata.annotations["n"].as_str()), ("b", "x,y"));
}

#[test]
fn an_instance_that_fails_ends_the_wait_with_its_reason() {
    let fake = Fake::start();
    fake.script(Script { failing: Some("no kernel".into()), ..Default::default() });
    let error = ctl(&fake, &CREATE).failed(8);
    assert!(error.contains("instance db failed: no kernel"), "{error}");
}

#[test]
fn a_wait_that_takes_too_long_shows_why_and_how_to_go_on() {
    let fake = Fake::start();
    fake.script(Script { pending: Some("2 nodes: not enough memory".into()), ..Default::default() });
    let began = Instant::now();
    let error = ctl(&fake, &[&CREATE[..], &["--timeout", "500ms"]].concat()).failed(7);
    assert!(began.elapsed() < Duration::from_secs(10));
    for part in ["still PENDING", "2 nodes: not enough memory", "500ms", "instance get db --watch"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // One line per change where there is no terminal.
    assert!(error.contains("instance db: PENDING"), "{error}");
}

#[test]
fn no_wait_returns_at_once() {
    let fake = Fake::start();
    fake.script(Script { pending: Some("waits".into()), ..Default::default() });
    let text = ctl(&fake, &[&CREATE[..], &["--no-wait"]].concat()).ok();
    assert!(text.starts_with("instance db is PENDING (id new-db)"), "{text}");
    assert_eq!(ctl(&fake, &[&CREATE[..], &["--no-wait"]].concat()).code, 4, "the name is taken");
}

#[test]
fn each_verb_is_waited_for() {
    let fake = Fake::with_instances();
    let state = |name: &str| fake.instance(name).unwrap().state();
    assert!(ctl(&fake, &["vm", "stop", "web"]).ok().starts_with("instance web is STOPPED"));
    assert_eq!(state("web"), InstanceState::Stopped);
    assert!(ctl(&fake, &["vm", "start", "web"]).ok().starts_with("instance web is RUNNING"));
    ctl(&fake, &["vm", "pause", "web"]).ok();
    assert_eq!(state("web"), InstanceState::Paused);
    ctl(&fake, &["vm", "resume", "web"]).ok();
    ctl(&fake, &["vm", "restart", "web"]).ok();
    ctl(&fake, &["vm", "stop", "web", "--force", "--grace", "5s"]).ok();
    assert_eq!(fake.mutations(), ["stop", "start", "pause", "resume", "restart", "stop --force"]);
}

#[test]
fn several_instances_are_deleted_and_a_missing_one_can_be_ignored() {
    let fake = Fake::with_instances();
    let text = ctl(&fake, &["instance", "rm", "web", "job", "web"]).ok();
    assert!(text.contains("instance web is deleted") && text.contains("instance job is deleted"), "{text}");
    assert!(fake.instance("web").is_none() && fake.instance("job").is_none());
    ctl(&fake, &["instance", "delete", "web"]).failed(3);
    ctl(&fake, &["instance", "delete", "web", "--ignore-not-found"]).ok();
}

#[test]
fn nothing_is_changed_if_one_of_several_names_is_wrong() {
    let fake = Fake::with_instances();
    ctl(&fake, &["instance", "stop", "web", "nobody"]).failed(3);
    assert!(fake.mutations().is_empty());
}

#[test]
fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let fake = Fake::start();
    fake.script(Script { lost_answers: 1, ..Default::default() });
    ctl(&fake, &CREATE).ok();
    assert_eq!(fake.mutations(), ["create"], "one effect");

    let key = ["--request-key", "mine"];
    fake.script(Script::default());
    ctl(&fake, &[&["vm", "stop", "db"][..], &key].concat()).ok();
    assert_eq!(fake.model.lock().mutations.last().unwrap().1, "mine");
    ctl(&fake, &["vm", "stop", "db", "--request-key", "a/b"]).failed(2);
}

#[test]
fn a_refusal_names_the_instance_and_exits_with_5() {
    let fake = Fake::with_instances();
    let error = ctl(&fake, &["instance", "pause", "job"]).failed(5);
    assert!(error.contains("cannot pause instance job: only a running instance can be paused"), "{error}");
}

#[test]
fn a_watch_that_ends_early_is_begun_again() {
    let fake = Fake::start();
    fake.script(Script { short_watches: true, ..Default::default() });
    ctl(&fake, &CREATE).ok();
    assert_eq!(fake.instance("db").unwrap().wanted(), InstanceWanted::Running);
    ctl(&fake, &["vm", "delete", "db"]).ok();
}

#[test]
fn quiet_prints_nothing_and_name_prints_the_name() {
    let fake = Fake::with_instances();
    let ran = ctl(&fake, &["vm", "stop", "web", "-q"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""));
    assert_eq!(ctl(&fake, &["vm", "start", "web", "-o", "name"]).ok(), "vm/web\n");
}

#[test]
fn nodes_are_cordoned_uncordoned_and_drained() {
    let fake = Fake::start();
    assert_eq!(
        ctl(&fake, &["node", "cordon", "alpha", "node-b-id"]).ok(),
        "node alpha is MAINTENANCE\nnode beta is MAINTENANCE\n"
    );
    assert_eq!(ctl(&fake, &["node", "uncordon", "beta"]).ok(), "node beta is READY\n");
    let ran = ctl(&fake, &["node", "drain", "alpha"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "node alpha is DRAINING\n"));
    assert!(ran.stderr.contains("0 of 1 moved"), "{ran:?}");
    fake.script(Script { blocker: Some("its disk lies on the node".into()), ..Default::default() });
    let error = ctl(&fake, &["node", "drain", "alpha"]).failed(5);
    assert!(error.contains("web: its disk lies on the node"), "{error}");
}

#[test]
fn a_clone_is_waited_for_and_a_fleet_of_them_too() {
    let fake = Fake::with_instances();
    let ran = ctl(&fake, &["vm", "clone", "web", "--snapshot", "warm", "copy"]).ok();
    assert!(ran.starts_with("instance copy is RUNNING on node node-a-id"), "{ran}");
    let origin = fake.instance("copy").unwrap().spec.unwrap().clone_of.unwrap();
    assert_eq!(origin.snapshot, "warm");
    let described = ctl(&fake, &["instance", "describe", "copy"]).ok();
    assert!(described.contains("snapshot warm of instance"), "{described}");
    let many = ["vm", "clone", "web", "--snapshot", "warm", "fleet", "--count", "3", "-o", "name"];
    assert_eq!(ctl(&fake, &many).ok(), "vm/fleet-1\nvm/fleet-2\nvm/fleet-3\n");
    let why = ctl(&fake, &["vm", "clone", "web", "--snapshot", "cold", "other"]).failed(3);
    assert!(why.contains("no such snapshot"), "{why}");
    ctl(&fake, &["vm", "clone", "web", "copy"]).failed(2);
}
