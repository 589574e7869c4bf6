//! Claims about the cache.

use std::collections::BTreeMap;
use std::sync::Arc;

use hv_proto::store::NodeLease;
use hv_proto::{convert, v1};
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::record::{Record, encode_message};
use hv_store::{Op, SharedStore, StoreError, StoreExt, Txn};
use hv_types::instance::Binding;
use hv_types::{InstanceRecord, InstanceState, Metadata, NodeId, NodeRecord, NodeStatus, Revision, Selector};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_util::sync::CancellationToken;

use crate::instances::Filter;

use super::{Cache, Delta, Keys, State, SubscriptionError};

struct World {
    store: SharedStore,
    keys: Keys,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), EmbeddedOptions::default()).unwrap();
    World { store, keys: Keys::default(), _dir: dir }
}

impl World {
    fn cache(&self) -> Arc<Cache> {
        Cache::new(self.store.clone(), self.keys.clone())
    }

    async fn txn(&self, then: Vec<Op>) {
        self.store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    }

    fn lease_of(&self, node: &NodeId) -> Op {
        let sign = NodeLease { schema: convert::RECORD_SCHEMA, lease_id: 7, ttl_ms: 0 };
        Op::put(self.keys.node_lease(node), encode_message(&sign))
    }
}

fn instance(name: &str) -> InstanceRecord {
    let spec =
        v1::InstanceSpec { image: "tiny".into(), cpu_cores: 2, memory_bytes: 64 << 20, ..Default::default() };
    let request = v1::CreateInstanceRequest {
        name: name.into(),
        r#type: v1::InstanceType::Vm.into(),
        spec: Some(spec),
        ..Default::default()
    };
    convert::create_request_from(request).unwrap()
}

fn node(id: &str) -> NodeRecord {
    let request = v1::RegisterNodeRequest {
        node_id: id.into(),
        hostname: id.into(),
        ip: "127.0.0.1".into(),
        ..Default::default()
    };
    convert::node_from_registration(request).unwrap()
}

/// Everything that the state says, so that two can be compared.
fn told(state: &State) -> String {
    let nodes: Vec<_> = state
        .nodes()
        .map(|(r, e)| format!("{} {:?} {:?} {:?} {:?}", r.id, r.revision, e.lease, e.instances, e.allocated))
        .collect();
    let instances: Vec<_> = state
        .instances_after(None)
        .map(|r| format!("{:?} by name {:?}", state.view(r), state.instance_named(&r.project, &r.name)))
        .collect();
    let unbound: Vec<_> = state.unbound().map(|r| r.id.to_string()).collect();
    let events: Vec<_> = state.events_before(None).map(|e| e.id.clone()).collect();
    let counts = state.counts();
    format!("{counts:?} {} {nodes:#?} {instances:#?} {unbound:?} {events:?}", state.revision())
}

/// The ids of all that match, by the indexes and in pieces of two; and that nothing else would be found by looking at all.
fn check_indexes(state: &State, seed: u64) {
    let labelled = |key: &str, value: &str| {
        Selector::new([(key.to_owned(), value.to_owned())].into_iter().collect()).unwrap()
    };
    let mut filters: Vec<Filter> =
        InstanceState::ALL.map(|s| Filter { state: Some(s), ..Filter::default() }).into();
    filters.extend((0..3).map(|n| Filter { node: format!("n{n}").parse().ok(), ..Filter::default() }));
    filters.extend(
        [("n", "1"), ("n", "*"), ("tier", "web"), ("no", "such")]
            .map(|(key, value)| Filter { selector: labelled(key, value), ..Filter::default() }),
    );
    filters.extend(["p0", "p1", "nobody"].map(|p| Filter { project: p.into(), ..Filter::default() }));
    filters.extend(["i1", "0", "zzz"].map(|r| Filter { reference: r.into(), ..Filter::default() }));
    filters.push(Filter {
        project: "p1".into(),
        state: Some(InstanceState::Unknown),
        selector: labelled("tier", "web"),
        ..Filter::default()
    });
    for filter in &filters {
        let all = state.instances_after(None).map(|record| state.view(record));
        let expected: Vec<_> = all.filter(|seen| filter.matches(seen)).map(|seen| seen.id.clone()).collect();
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let chunk = state.instances_matching(filter, after.as_ref(), 2, 2);
            found.extend(chunk.found.into_iter().map(|candidate| candidate.shown().id.clone()));
            let Some(next) = chunk.next else { break };
            after = Some(next);
        }
        assert_eq!(found, expected, "seed {seed}: {filter:?}");
        let known = state.known_count(filter);
        assert!(known.is_none_or(|known| known == expected.len()), "seed {seed}: {filter:?}: {known:?}");
    }
    let ready = state.nodes().filter(|(_, entry)| entry.status() == NodeStatus::Ready).count();
    let counts = state.counts();
    assert_eq!((counts.nodes, counts.ready), (state.nodes().count(), ready), "seed {seed}");
    let allocated = state.nodes().map(|(_, entry)| entry.allocated).sum();
    assert_eq!((counts.unbound, counts.allocated), (state.unbound().count(), allocated), "seed {seed}");
}

/// One random transaction over few objects, so that they meet often.
async fn random_change(world: &World, rng: &mut StdRng, instances: &[InstanceRecord]) {
    let node_id: NodeId = format!("n{}", rng.random_range(0..3)).parse().unwrap();
    let mut record = instances[rng.random_range(0..instances.len())].clone();
    let op = match rng.random_range(0..8) {
        0 => Op::put(world.keys.node(&node_id), node(node_id.as_str()).encode()),
        1 => Op::delete(world.keys.node(&node_id)),
        2 => world.lease_of(&node_id),
        3 => Op::delete(world.keys.node_lease(&node_id)),
        4 => Op::delete(world.keys.instance(&record.id)),
        5 => Op::put("/elsewhere", "x"),
        _ => {
            record.binding = rng.random_bool(0.7).then_some(Binding { node_id, release: false });
            Arc::make_mut(&mut record.spec).cpu_cores = rng.random_range(1..9);
            record.state = InstanceState::ALL[rng.random_range(0..4)];
            record.project = format!("p{}", rng.random_range(0..2));
            record.set = if rng.random_bool(0.5) { "s".into() } else { String::new() };
            let labels = [("n", rng.random_range(0..3).to_string()), ("tier", "web".to_owned())];
            let kept = rng.random_range(0..3);
            let labels = labels.into_iter().take(kept).map(|(key, value)| (key.to_owned(), value)).collect();
            record.metadata = Arc::new(Metadata { labels, ..Metadata::default() });
            Op::put(world.keys.instance(&record.id), record.encode())
        }
    };
    world.txn(vec![op]).await;
}

#[tokio::test]
async fn after_any_history_the_state_is_that_of_a_fresh_fill_and_the_changes_add_up_to_it() {
    for seed in 0..30 {
        let world = world();
        let mut rng = StdRng::seed_from_u64(seed);
        let instances: Vec<_> = (0..4).map(|n| instance(&format!("i{n}"))).collect();
        for _ in 0..20 {
            random_change(&world, &mut rng, &instances).await;
        }
        let cache = world.cache();
        let stop = CancellationToken::new();
        let (runs, token) = (cache.clone(), stop.clone());
        let follower = tokio::spawn(async move { runs.run(token).await });
        cache.wait_for(world.store.revision().await.unwrap()).await.unwrap();
        let (mut known, mut changes) = cache.subscribe(|state| {
            state.instances_after(None).map(|r| (r.id.clone(), r.revision)).collect::<BTreeMap<_, _>>()
        });
        for _ in 0..60 {
            random_change(&world, &mut rng, &instances).await;
        }
        let end = world.store.revision().await.unwrap();
        cache.wait_for(end).await.unwrap();

        let fresh = world.cache();
        fresh.fill().await.unwrap();
        assert_eq!(cache.read(told), fresh.read(told), "seed {seed}");
        cache.read(|state| check_indexes(state, seed));
        fresh.read(|state| check_indexes(state, seed));
        loop {
            let batch = changes.next().await.unwrap().unwrap();
            for delta in &batch.deltas {
                if let Delta::Instance { id, before, after } = delta {
                    assert_eq!(known.get(id).copied(), before.as_ref().map(|r| r.revision), "seed {seed}");
                    match after {
                        Some(record) => known.insert(id.clone(), record.revision),
                        None => known.remove(id),
                    };
                }
            }
            if batch.revision >= end {
                break;
            }
        }
        let now =
            cache.read(|state| state.instances_after(None).map(|r| (r.id.clone(), r.revision)).collect());
        assert_eq!(known, now, "seed {seed}");
        stop.cancel();
        follower.await.unwrap();
    }
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "the cache is read while it is read")]
fn a_look_within_a_look_is_told_of_before_it_hangs_a_server() {
    let cache = world().cache();
    cache.read(|_| cache.read(State::revision));
}

#[tokio::test]
async fn what_was_missed_and_compacted_is_published_as_differences() {
    let world = world();
    let (kept, gone, come) = (instance("kept"), instance("gone"), instance("come"));
    let n1: NodeId = "n1".parse().unwrap();
    let bound =
        InstanceRecord { binding: Some(Binding { node_id: n1.clone(), release: false }), ..kept.clone() };
    let put = |r: &InstanceRecord| Op::put(world.keys.instance(&r.id), r.encode());
    world
        .txn(vec![
            put(&bound),
            put(&gone),
            Op::put(world.keys.node(&n1), node("n1").encode()),
            world.lease_of(&n1),
        ])
        .await;
    let cache = world.cache();
    let first = cache.fill().await.unwrap();
    let ((), mut changes) = cache.subscribe(|_| ());

    world
        .txn(vec![
            put(&come),
            Op::delete(world.keys.instance(&gone.id)),
            Op::delete(world.keys.node_lease(&n1)),
        ])
        .await;
    let now = world.store.put("/elsewhere", "x").await.unwrap();
    world.store.compact(now).await.unwrap();
    let mut from = Some(Revision(first.0 + 1));
    assert!(matches!(cache.follow(&mut from).await, Err(StoreError::Compacted { .. })));
    cache.fill().await.unwrap();

    let batch = changes.next().await.unwrap().unwrap();
    assert_eq!(batch.revision, now);
    let mut seen: Vec<_> = batch
        .deltas
        .iter()
        .map(|delta| match delta {
            Delta::Instance { id, before, after } => (id.to_string(), before.is_some(), after.is_some()),
            Delta::Node { id, before, after } => {
                (id.to_string(), before.as_ref().unwrap().1, after.as_ref().unwrap().1)
            }
            Delta::Event(event) => panic!("{event:?}"),
            Delta::Operation { id, .. } => panic!("{id}"),
            Delta::Hold { id, .. } => panic!("{id}"),
        })
        .collect();
    seen.sort();
    let mut expected = vec![
        (come.id.to_string(), false, true),
        (gone.id.to_string(), true, false),
        // Its record is the same, but its node is lost.
        (kept.id.to_string(), true, true),
        ("n1".to_owned(), true, false),
    ];
    expected.sort();
    assert_eq!(seen, expected);
    // Who resumes gets the differences too: between the two revisions nothing else is known.
    let mut resumed = cache.subscribe_from(Revision(first.0 + 1)).unwrap();
    assert_eq!(resumed.next().await.unwrap().unwrap().revision, now);
}

#[tokio::test]
async fn a_subscription_resumes_without_gap_or_repetition() {
    let world = world();
    let cache = world.cache();
    let mut revisions = vec![cache.fill().await.unwrap()];
    let stop = CancellationToken::new();
    let (runs, token) = (cache.clone(), stop.clone());
    let follower = tokio::spawn(async move { runs.run(token).await });
    for n in 0..10 {
        let record = instance(&format!("i{n}"));
        revisions.push(world.store.put(world.keys.instance(&record.id), record.encode()).await.unwrap());
    }
    cache.wait_for(*revisions.last().unwrap()).await.unwrap();
    let mut resumed = cache.subscribe_from(revisions[5]).unwrap();
    for expected in &revisions[5..] {
        let batch = loop {
            let batch = resumed.next().await.unwrap().unwrap();
            if !batch.deltas.is_empty() {
                break batch;
            }
        };
        assert_eq!(batch.revision, *expected);
    }
    let next = Revision(cache.revision().0 + 1);
    assert!(cache.subscribe_from(next).is_ok());
    let beyond = Revision(next.0 + 1);
    assert_eq!(
        cache.subscribe_from(beyond).err(),
        Some(SubscriptionError::Expired),
        "a revision of another history"
    );
    stop.cancel();
    follower.await.unwrap();
}

#[tokio::test]
async fn who_is_too_slow_is_told_so_and_old_revisions_expire() {
    let world = world();
    let cache = world.cache();
    let begin = cache.fill().await.unwrap();
    let ((), mut slow) = cache.subscribe(|_| ());
    let record = instance("web");
    for n in 1..=20_000 {
        let revision = Revision(begin.0 + n);
        let kv = hv_store::KeyValue {
            key: world.keys.instance(&record.id),
            value: record.encode(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            lease: None,
        };
        cache.apply(revision, vec![hv_store::Change::Put(kv)]);
    }
    assert_eq!(slow.next().await.err(), Some(SubscriptionError::Lagged));
    assert_eq!(cache.subscribe_from(Revision(begin.0 + 1)).err(), Some(SubscriptionError::Expired));
    let mut recent = cache.subscribe_from(Revision(begin.0 + 10_000)).unwrap();
    assert_eq!(recent.next().await.unwrap().unwrap().revision, Revision(begin.0 + 10_000));
}

#[tokio::test]
async fn waiting_for_a_revision_that_does_not_come_ends_with_a_clear_error() {
    let world = world();
    let refusal = world.cache().wait_for(Revision(u64::MAX)).await.unwrap_err();
    assert_eq!(refusal.to_string(), "this server has not caught up with the store; try again");
}
