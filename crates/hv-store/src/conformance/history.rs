//! A random history, held against a model: every revision as a range, and all of them as a watch.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::probe::{below, changes_until, commit, key, range_at, watch};
use crate::{Change, Op, Revision, SharedStore, Txn};

const CHAPTER: &str = "history";
const STEPS: usize = 150;
const KEYS: u32 = 12;

/// What the store must hold: key -> (value, create revision, version).
type Model = BTreeMap<String, (String, Revision, u64)>;

pub(super) async fn run(store: &SharedStore) {
    let seed = rand::random::<u64>();
    eprintln!("history: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut model = Model::new();
    let mut states: Vec<(Revision, Model)> = Vec::new();
    for step in 0..STEPS {
        let ops = random_ops(&mut random, step);
        let touches = ops.iter().any(|op| match op {
            Op::Put { .. } => true,
            Op::Delete(crate::KeyRange::Key(key)) => model.contains_key(&text(key)),
            Op::Delete(_) => false,
        });
        let revision = commit(store, Txn { then: ops.clone(), ..Txn::default() }).await;
        if touches {
            apply(&mut model, &ops, revision);
            states.push((revision, model.clone()));
        }
        if step == STEPS / 2 {
            // What was superseded by then may go; what is checked below is newer.
            states.drain(..states.len() - 1);
            store.compact(revision).await.expect("compaction works");
        }
    }
    for (revision, wanted) in &states {
        let found = range_at(store, below(CHAPTER, ""), *revision).await.unwrap_or_else(|error| {
            panic!("seed {seed}: revision {revision} cannot be read: {error}");
        });
        let found: Model = found
            .kvs
            .into_iter()
            .map(|kv| (text(&kv.key), (text(&kv.value), kv.create_revision, kv.version)))
            .collect();
        assert_eq!(found, *wanted, "seed {seed}, revision {revision}");
    }
    replay(store, seed, &states).await;
}

/// The changes after the first state must lead through all others.
async fn replay(store: &SharedStore, seed: u64, states: &[(Revision, Model)]) {
    let (first, mut replayed) = states[0].clone();
    let last = states[states.len() - 1].0;
    let mut stream = watch(store, below(CHAPTER, ""), Some(Revision(first.0 + 1))).await;
    let seen = changes_until(&mut stream, last).await;
    assert_eq!(seen.len(), states.len() - 1, "seed {seed}: one item for each revision");
    for (events, (revision, wanted)) in seen.iter().zip(&states[1..]) {
        assert_eq!(events.revision, *revision, "seed {seed}");
        for change in &events.changes {
            match change {
                Change::Put(kv) => {
                    assert_eq!(kv.mod_revision, *revision, "seed {seed}");
                    replayed.insert(text(&kv.key), (text(&kv.value), kv.create_revision, kv.version));
                }
                Change::Deleted { key, revision: at } => {
                    assert_eq!(at, revision, "seed {seed}");
                    assert!(replayed.remove(&text(key)).is_some(), "seed {seed}: nothing to delete");
                }
            }
        }
        assert_eq!(replayed, *wanted, "seed {seed}, revision {revision}");
    }
}

fn random_ops(random: &mut StdRng, step: usize) -> Vec<Op> {
    let mut ops = BTreeMap::new();
    for _ in 0..random.random_range(1..=4) {
        let name = key(CHAPTER, &format!("{:02}", random.random_range(0..KEYS)));
        let op = if random.random_bool(0.6) {
            Op::put(name.clone(), step.to_string())
        } else {
            Op::delete(name.clone())
        };
        ops.insert(name, op);
    }
    ops.into_values().collect()
}

fn apply(model: &mut Model, ops: &[Op], revision: Revision) {
    for op in ops {
        match op {
            Op::Put { key, value, .. } => {
                let entry = model.entry(text(key)).or_insert((String::new(), revision, 0));
                entry.0 = text(value);
                entry.2 += 1;
            }
            Op::Delete(crate::KeyRange::Key(key)) => drop(model.remove(&text(key))),
            Op::Delete(_) => unreachable!("only single keys are deleted here"),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the chapter writes text")
}
