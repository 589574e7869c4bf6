//! What operators do: operations, the store, lost nodes; and why something is placed where it is.

use hv_proto::v1::{self, InstanceState};

use crate::fake::{BACKUP, Fake, Script};
use crate::program::{ctl, ctl_with_input};

#[test]
fn operations_are_listed_watched_and_cancelled() {
    let fake = Fake::start();
    ctl(&fake, &["node", "drain", "alpha", "--max-parallel", "7", "--no-wait"]).ok();
    let list = ctl(&fake, &["operation", "list", "--active"]).ok();
    assert!(list.contains("drain-node") && list.contains("node/alpha") && list.contains("RUNNING"), "{list}");
    let page = ctl(&fake, &["operation", "get", "0190a1b2"]).ok();
    assert!(page.contains("max_parallel") && page.contains('7'), "{page}");
    let ended = ctl(&fake, &["operation", "watch", "0190a1b2"]).ok();
    assert!(ended.contains("SUCCEEDED"), "{ended}");
    let cancelled = ctl(&fake, &["operation", "cancel", "0190a1b2-drain", "-o", "json"]).ok();
    assert!(cancelled.contains("CANCELLING"), "{cancelled}");
    assert_eq!(ctl(&fake, &["operation", "get", "nothing"]).code, 3);
}

#[test]
fn a_backup_appears_whole_and_is_restored_byte_by_byte() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("records.backup");
    let name = file.to_str().unwrap();
    ctl(&fake, &["store", "backup", name]).ok();
    assert_eq!(std::fs::read(&file).unwrap(), BACKUP);
    assert_eq!(ctl(&fake, &["store", "backup", "-"]).ok().as_bytes(), BACKUP);
    let restored = ctl(&fake, &["store", "restore", name]).ok();
    assert!(restored.contains("7 records restored"), "{restored}");
    assert_eq!(fake.model.lock().restored, BACKUP);
    ctl_with_input(&fake, &["store", "restore", "-"], "from a pipe").ok();
    assert_eq!(fake.model.lock().restored, b"from a pipe");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_move_freezes_the_old_server_and_unfreezes_it_where_it_fails() {
    let (old, new) = (Fake::start(), Fake::start());
    new.script(Script { restore_refused: Some("the store is not empty".into()), ..Default::default() });
    let error = ctl(&old, &["store", "migrate", "--to", &new.address()]).failed(5);
    assert!(error.contains("not empty"), "{error}");
    assert!(!old.model.lock().frozen);
    new.script(Script::default());
    let said = ctl(&old, &["store", "migrate", "--to", &new.address()]).ok();
    assert!(said.contains("stays frozen"), "{said}");
    assert!(old.model.lock().frozen);
    assert_eq!(new.model.lock().restored, BACKUP);
    assert!(ctl(&old, &["store", "status"]).ok().contains("frozen"));
    assert!(!ctl(&old, &["store", "unfreeze"]).ok().contains("frozen"));
}

#[test]
fn the_store_tells_how_it_is_and_what_it_holds() {
    let fake = Fake::start();
    let page = ctl(&fake, &["store", "status"]).ok();
    assert!(page.contains("embedded") && page.contains("the disk is nearly full"), "{page}");
    assert_eq!(ctl(&fake, &["store", "dump"]).ok().lines().count(), 2);
    ctl(&fake, &["store", "compact", "--defragment"]).ok();
}

#[test]
fn an_explanation_counts_per_rule_and_says_what_would_help() {
    let fake = Fake::with_instances();
    let page = ctl(&fake, &["instance", "explain", "web"]).ok();
    for part in ["none of 2 nodes", "Cpu", "alpha, beta", "free 4 cores on alpha"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let schedule = ["schedule", "--dry-run", "--type", "vm", "--image", "tiny", "--count", "3"];
    let ran = ctl(&fake, &schedule);
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.stdout.contains("2 would wait"), "{ran:?}");
    assert_eq!(ctl(&fake, &["schedule", "--type", "vm", "--image", "tiny"]).code, 2);
}

#[test]
fn a_set_is_created_with_one_request_and_waited_for() {
    let fake = Fake::start();
    let arguments = [
        "vm",
        "create",
        "web",
        "--count",
        "3",
        "--image",
        "tiny",
        "--label",
        "tier=web",
        "--restart",
        "on-failure",
        "--failover",
        "restart",
        "--spread",
        "tier=web,topology=zone",
        "--away",
        "instance=db",
        "--priority",
        "-5",
        "--toleration",
        "gpu",
        "-o",
        "json",
    ];
    let made = ctl(&fake, &arguments).ok();
    assert!(made.contains("\"web-3\""), "{made}");
    assert_eq!(fake.mutations(), ["create-set"]);
    let member = fake.instance("web-1").unwrap();
    assert_eq!(
        (member.restart_policy(), member.failover_policy()),
        (v1::RestartPolicy::OnFailure, v1::FailoverPolicy::Restart)
    );
    let rules = member.placement.unwrap();
    assert_eq!(
        (rules.affinity.len(), rules.spread.len(), rules.tolerations.len(), rules.priority),
        (1, 1, 1, -5)
    );
    assert_eq!(fake.instance("web-3").unwrap().state(), InstanceState::Running);
}

#[test]
fn nodes_are_changed_held_confirmed_and_removed() {
    let fake = Fake::start();
    let update = [
        "node",
        "update",
        "alpha",
        "--taint",
        "gpu=a100:prefer",
        "--overcommit",
        "cpu=400",
        "--reserve",
        "cpus=1,memory=1GiB",
    ];
    ctl(&fake, &update).ok();
    let page = ctl(&fake, &["node", "describe", "alpha"]).ok();
    for part in ["gpu=a100:prefer", "400 % of cores", "1 cores, 1GiB memory"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    ctl(&fake, &["node", "hold-failover", "alpha"]).ok();
    assert!(ctl(&fake, &["node", "describe", "alpha"]).ok().contains("held by an operator"));
    ctl(&fake, &["node", "release-failover", "alpha"]).ok();
    ctl(&fake, &["node", "confirm-down", "alpha"]).ok();
    assert!(fake.model.lock().nodes["node-a-id"].confirmed_down);
    assert_eq!(ctl(&fake, &["node", "update", "alpha"]).code, 2);
    assert_eq!(ctl(&fake, &["node", "remove", "alpha"]).code, 5);
    ctl(&fake, &["node", "remove", "alpha", "--force"]).ok();
    assert!(!fake.model.lock().nodes.contains_key("node-a-id"));
}
