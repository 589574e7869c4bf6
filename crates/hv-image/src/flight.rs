//! One at a time for each thing: of several pulls that need the same, the first does it and the others find
//! it done.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// Locks by name. A lock that nobody holds or waits for takes no space.
#[derive(Default)]
pub(crate) struct Flights(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Flights {
    /// Waits until nobody else has the thing.
    pub(crate) async fn take(&self, thing: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut flights = self.0.lock();
            flights.retain(|_, lock| lock.strong_count() > 0);
            match flights.get(thing).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    flights.insert(thing.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
