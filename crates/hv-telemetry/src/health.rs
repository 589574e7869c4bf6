//! Whether the process can serve: named checks, and the HTTP paths that show them.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

use crate::metrics::{CONTENT_TYPE, Metrics};

/// The longest reason that is kept, in characters.
const MAX_REASON_CHARACTERS: usize = 512;

/// What a check says before it was ever set.
const STARTING: &str = "starting";

/// The checks of one process (or of one server, where a test runs several). Clones share them.
///
/// The process is ready when every check is; without checks it is ready.
#[derive(Debug, Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// By name: why it is not ready, or `None`.
    checks: Mutex<BTreeMap<&'static str, Option<String>>>,
    ready: watch::Sender<bool>,
}

/// One named check. Clones set the same check.
#[derive(Debug, Clone)]
pub struct Check {
    name: &'static str,
    shared: Arc<Shared>,
}

/// A check that is not ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failing {
    /// The name of the check.
    pub check: &'static str,
    /// Why it is not ready.
    pub reason: String,
}

/// The body of `/readyz`.
#[derive(Debug, Serialize)]
struct Readiness {
    ready: bool,
    failing: Vec<Failing>,
}

impl Default for Health {
    fn default() -> Self {
        let shared = Shared { checks: Mutex::default(), ready: watch::Sender::new(true) };
        Self { shared: Arc::new(shared) }
    }
}

impl Health {
    /// No checks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a check, which is not ready ("starting") until it says otherwise. A name that exists already gives
    /// the same check as it stands.
    pub fn check(&self, name: &'static str) -> Check {
        let check = Check { name, shared: Arc::clone(&self.shared) };
        self.shared.change(|checks| {
            checks.entry(name).or_insert_with(|| Some(STARTING.to_owned()));
        });
        check
    }

    /// Whether every check is ready.
    pub fn is_ready(&self) -> bool {
        *self.shared.ready.borrow()
    }

    /// The checks that are not ready, by name.
    pub fn failing(&self) -> Vec<Failing> {
        let checks = self.shared.checks.lock();
        let failing = checks.iter().filter_map(|(check, reason)| {
            reason.as_ref().map(|reason| Failing { check, reason: reason.clone() })
        });
        failing.collect()
    }

    /// Follows [`is_ready`](Self::is_ready), for instance to set the gRPC health service.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.shared.ready.subscribe()
    }

    /// `/healthz` (200 while the process answers), `/readyz` (200, or 503 with the failing checks, as JSON) and
    /// `/metrics` (Prometheus).
    pub fn router(&self, metrics: Metrics) -> axum::Router {
        let health = self.clone();
        let readyz = move || {
            let failing = health.failing();
            let ready = failing.is_empty();
            let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            std::future::ready((status, Json(Readiness { ready, failing })).into_response())
        };
        let render = move || std::future::ready(([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.render()));
        axum::Router::new()
            .route("/healthz", get(|| std::future::ready("ok")))
            .route("/readyz", get(readyz))
            .route("/metrics", get(render))
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut BTreeMap<&'static str, Option<String>>)) {
        // The lock is held while the watch is set, so that the last change is also the last one seen.
        let mut checks = self.checks.lock();
        change(&mut checks);
        let ready = checks.values().all(Option::is_none);
        self.ready.send_if_modified(|seen| std::mem::replace(seen, ready) != ready);
    }
}

impl Check {
    /// The check passes.
    pub fn ready(&self) {
        self.shared.change(|checks| {
            checks.insert(self.name, None);
        });
    }

    /// The check fails; `reason` tells an operator why, and is cut to a bounded length.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let mut reason: String = reason.into();
        if let Some((end, _)) = reason.char_indices().nth(MAX_REASON_CHARACTERS) {
            reason.truncate(end);
        }
        self.shared.change(|checks| {
            checks.insert(self.name, Some(reason));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_must_be_ready() {
        let health = Health::new();
        assert!(health.is_ready());
        let (store, leader) = (health.check("store"), health.check("leader"));
        assert!(!health.is_ready());
        assert_eq!(health.failing()[1], Failing { check: "store", reason: "starting".to_owned() });
        store.ready();
        assert!(!health.is_ready());
        leader.ready();
        assert!(health.is_ready());
        store.not_ready("lost");
        assert_eq!(health.failing(), [Failing { check: "store", reason: "lost".to_owned() }]);
    }

    #[test]
    fn registering_a_check_again_keeps_its_state() {
        let health = Health::new();
        health.check("store").ready();
        health.check("store");
        assert!(health.is_ready());
    }

    #[test]
    fn a_subscriber_sees_only_changes() {
        let health = Health::new();
        let check = health.check("store");
        let mut ready = health.subscribe();
        check.not_ready("still");
        assert!(!ready.has_changed().unwrap());
        check.ready();
        assert!(ready.has_changed().unwrap() && *ready.borrow_and_update());
    }

    #[test]
    fn a_reason_is_cut_to_its_bound() {
        let health = Health::new();
        health.check("store").not_ready("é".repeat(10_000));
        assert_eq!(health.failing()[0].reason.chars().count(), MAX_REASON_CHARACTERS);
    }
}
