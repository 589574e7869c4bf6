//! Asking guests that count: how the suite knows that memory or a disk was kept.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use hv_types::InstanceId;

use super::{Counter, Grows, within};
use crate::{Driver, Input};

/// How often a number is asked for before something is made of it.
const ASKED_BEFORE: usize = 3;
/// How much a number that grows by itself has grown then, at least.
const GROWN: u64 = 3;
/// How long an echo may take before the line is typed again: a guest that boots hears nothing.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// The number, now.
pub(super) async fn ask(driver: &dyn Driver, id: &InstanceId, counter: &Counter) -> u64 {
    static ASKED: AtomicU64 = AtomicU64::new(1);
    let mark = format!("ask {}.", ASKED.fetch_add(1, Ordering::Relaxed));
    let mut console = driver.console(id).await.expect("console");
    let typed = async |text: &str| {
        let text = Bytes::copy_from_slice(text.as_bytes());
        console.input.send(Input::Data(text)).await.expect("input");
    };
    let mut printed = String::new();
    within("the guest counts", async {
        typed(&format!("{mark}\n")).await;
        let mut is_heard = false;
        loop {
            match tokio::time::timeout(HEARD_WITHIN, console.output.next()).await {
                Ok(Some(piece)) => printed.push_str(&String::from_utf8_lossy(&piece.expect("output"))),
                Ok(None) => panic!("the console ended: {printed:?}"),
                Err(_) if is_heard => {}
                Err(_) => typed(&format!("{mark}\n")).await,
            }
            if !is_heard && printed.contains(&mark) {
                is_heard = true;
                typed(&counter.ask).await;
            }
            if let Some(number) = printed.find(&mark).and_then(|at| number(&printed[at..], &counter.answer)) {
                return number;
            }
        }
    })
    .await
}

/// The number behind the answer's first words, once its last digit is certain.
fn number(printed: &str, answer: &str) -> Option<u64> {
    let rest = &printed[printed.find(answer)? + answer.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..end].parse().ok()
}

/// Lets it count on until the number says more than that the guest has just booted, and returns the last one.
pub(super) async fn count_on(driver: &dyn Driver, id: &InstanceId, counter: &Counter) -> u64 {
    let first = ask(driver, id, counter).await;
    let mut last = first;
    let mut asked = 1;
    within("the guest has counted", async {
        while asked < ASKED_BEFORE
            || (counter.grows == Grows::ByItself && last < first.saturating_add(1).saturating_mul(GROWN))
        {
            last = ask(driver, id, counter).await;
            asked += 1;
        }
    })
    .await;
    last
}

/// That it goes on from `kept`, and not from the `later` number that it had reached since, if it had.
pub(super) async fn assert_goes_on(
    driver: &dyn Driver,
    id: &InstanceId,
    counter: &Counter,
    kept: u64,
    later: Option<u64>,
) {
    let now = ask(driver, id, counter).await;
    match counter.grows {
        Grows::WhenAsked => assert_eq!(now, kept + 1, "it does not go on where it was"),
        Grows::ByItself => {
            assert!(now >= kept, "it counts {now} and had counted {kept}: it began anew");
            assert!(later.is_none_or(|later| now < later), "it counts {now}: nothing was undone");
        }
    }
}
