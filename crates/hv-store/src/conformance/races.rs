//! Many tasks on the same keys.

use std::collections::BTreeSet;

use futures::future::join_all;

use super::probe::{below, changes_until, key, request, watch};
use crate::{Compare, Op, SharedStore, StoreExt, Txn, TxnOutcome};

const CHAPTER: &str = "races";
const TASKS: usize = 64;
const ROUNDS: usize = 8;

pub(super) async fn run(store: &SharedStore) {
    a_counter_loses_no_increment(store).await;
    one_task_creates_a_key(store).await;
    every_write_has_its_own_revision(store).await;
}

async fn spawn_all<T: Send + 'static, F>(
    store: &SharedStore,
    task: impl Fn(SharedStore, usize) -> F,
) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
{
    let tasks = (0..TASKS).map(|index| tokio::spawn(task(store.clone(), index)));
    join_all(tasks).await.into_iter().map(|done| done.expect("no task panics")).collect()
}

async fn a_counter_loses_no_increment(store: &SharedStore) {
    let name = key(CHAPTER, "counter");
    store.put(name.clone(), "0").await.unwrap();
    spawn_all(store, |store, _| {
        let name = name.clone();
        async move {
            for _ in 0..ROUNDS {
                increment(&store, &name).await;
            }
        }
    })
    .await;
    let kv = store.get(name).await.unwrap().unwrap();
    assert_eq!(kv.value, (TASKS * ROUNDS).to_string().as_bytes());
    assert_eq!(kv.version, (TASKS * ROUNDS + 1) as u64, "no increment was written twice");
}

async fn increment(store: &SharedStore, name: &str) {
    let mut seen = store.get(name.to_owned()).await.unwrap().expect("the counter exists");
    loop {
        let value: u64 = std::str::from_utf8(&seen.value).unwrap().parse().unwrap();
        let txn = Txn {
            compares: vec![Compare::ModRevision(name.to_owned().into(), seen.mod_revision)],
            then: vec![Op::put(name.to_owned(), (value + 1).to_string())],
            otherwise_get: vec![name.to_owned().into()],
        };
        match store.txn(txn).await.unwrap() {
            TxnOutcome::Committed(_) => return,
            TxnOutcome::Refused(mut found) => {
                let found = found.remove(0).expect("the counter still exists");
                assert_ne!(found.mod_revision, seen.mod_revision, "refused although nothing had changed");
                seen = found;
            }
        }
    }
}

async fn one_task_creates_a_key(store: &SharedStore) {
    for round in 0..ROUNDS {
        let name = key(CHAPTER, &format!("create/{round}"));
        let won: Vec<bool> = spawn_all(store, |store, index| {
            let name = name.clone();
            async move {
                let txn = Txn {
                    compares: vec![Compare::Absent(name.clone().into())],
                    then: vec![Op::put(name, index.to_string())],
                    ..Txn::default()
                };
                matches!(store.txn(txn).await.unwrap(), TxnOutcome::Committed(_))
            }
        })
        .await;
        let winners: Vec<_> = (0..TASKS).filter(|index| won[*index]).collect();
        assert_eq!(winners.len(), 1, "{winners:?} all created {name}");
        let kv = store.get(name).await.unwrap().unwrap();
        assert_eq!((kv.value, kv.version), (winners[0].to_string().into(), 1));
    }
}

async fn every_write_has_its_own_revision(store: &SharedStore) {
    let mut stream = watch(store, below(CHAPTER, "own/"), None).await;
    let written = spawn_all(store, |store, index| async move {
        let mut revisions = Vec::new();
        for round in 0..ROUNDS {
            revisions
                .push(store.put(key(CHAPTER, &format!("own/{index}")), round.to_string()).await.unwrap());
        }
        assert!(revisions.is_sorted(), "a task's writes are in its order");
        revisions
    })
    .await;
    let revisions: BTreeSet<_> = written.into_iter().flatten().collect();
    assert_eq!(revisions.len(), TASKS * ROUNDS);
    let seen = changes_until(&mut stream, *revisions.last().unwrap()).await;
    assert!(seen.iter().map(|events| events.revision).eq(revisions), "the watch saw each of them once");
    assert_eq!(store.range(request(below(CHAPTER, "own/"))).await.unwrap().kvs.len(), TASKS);
}
