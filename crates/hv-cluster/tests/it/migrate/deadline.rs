//! How long a move may take, whoever leads.

use std::time::{Duration, SystemTime};

use hv_cluster::operations::migrate::MigrateOptions;
use hv_store::record::Record;
use hv_store::{Op, Txn};

use super::{Set, begin, ended, operation, options};
use crate::movers::Call;
use crate::world::{Server, config};

/// Where an operation keeps when it is given up.
const DEADLINE: &str = ".deadline_ms";

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_takes_too_long_is_given_up() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let short = MigrateOptions { timeout: Duration::from_secs(1), ..options() };
    let operation = begin(&set.server, &set.id, &short).await.unwrap();
    let done = ended(&set.server, &operation).await;
    assert!(done.message.contains("not done within 1 s"), "{}", done.message);
    set.is_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_gives_a_move_up_when_the_last_one_would_have() {
    let mut set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let id = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::AskSource).await;
    let asked = operation(&set.server, &id).await;
    let deadline_ms: u64 = asked.parameters[DEADLINE].parse().unwrap();
    let deadline = SystemTime::UNIX_EPOCH + Duration::from_millis(deadline_ms);
    let left = deadline.duration_since(asked.created_at).unwrap();
    assert!(left.abs_diff(options().timeout) < Duration::from_secs(1), "{left:?}");
    set.agents.abort();
    // Its time passes while nobody leads.
    let next = Server::idle(&set.disk.store, config("b")).await;
    std::mem::replace(&mut set.server, next).kill().await;
    set.server.cluster.sync().await.unwrap();
    let mut late = operation(&set.server, &id).await;
    late.parameters.insert(DEADLINE.into(), "1".into());
    let key = set.server.cluster.keys().operation(&id);
    let write = Txn { then: vec![Op::put(key, late.encode())], ..Txn::default() };
    set.disk.store.txn(write).await.unwrap();
    let next = Server::start(&set.disk.store, config("c")).await;
    next.cluster.set_nodes(set.movers.clone());
    std::mem::replace(&mut set.server, next).kill().await;
    set.agents = set.movers.agents(&set.server, &set.id);
    let done = ended(&set.server, &id).await;
    assert!(done.message.contains("not done within 3600 s"), "{}", done.message);
    set.is_as_before().await;
}
