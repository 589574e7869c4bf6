//! The console of a "running" instance, which echoes and counts, and its log.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{Console, DriverError, Input, LogRequest, Result, log};
use hv_types::InstanceId;
use tokio::sync::{broadcast, mpsc};

use crate::record::Phase;
use crate::{CONSOLE_QUEUE, Shared, not_running};

/// How many pieces of input wait for the guest.
const INPUT_QUEUE: usize = 64;
/// How much of a typed line is understood.
const MAX_LINE: usize = 256;

/// What was printed, and what will be; taken together so that nothing is lost or doubled in between.
fn attach(
    shared: &Shared,
    id: &InstanceId,
    what: &'static str,
    since_ms: u64,
) -> Result<(Vec<u8>, Option<broadcast::Receiver<Bytes>>)> {
    let mut live = shared.live.lock();
    let record = shared.settled(&mut live, id, what)?;
    let history = shared.files.printed(id, since_ms).map_err(|e| DriverError::failed(id, what, e))?;
    let runs = matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. });
    let receiver = runs
        .then(|| live.entry(id.clone()).or_insert_with(|| broadcast::channel(CONSOLE_QUEUE).0).subscribe());
    Ok((history, receiver))
}

fn until_closed(receiver: broadcast::Receiver<Bytes>) -> BoxStream<'static, Result<Bytes>> {
    stream::unfold(receiver, |mut receiver| async {
        loop {
            match receiver.recv().await {
                Ok(bytes) => return Some((Ok(bytes), receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
    .boxed()
}

pub(crate) fn console(shared: &Arc<Shared>, id: &InstanceId) -> Result<Console> {
    let (history, receiver) = attach(shared, id, "console", 0)?;
    let receiver = receiver.ok_or_else(|| not_running(id, "console"))?;
    let (input, mut typed) = mpsc::channel(INPUT_QUEUE);
    let (shared, id) = (Arc::downgrade(shared), id.clone());
    tokio::spawn(async move {
        let mut line = Vec::new();
        while let Some(input) = typed.recv().await {
            let (Input::Data(bytes), Some(shared)) = (input, shared.upgrade()) else { continue };
            if hear(&shared, &id, &bytes, &mut line).is_err() {
                return;
            }
        }
    });
    let history = stream::iter((!history.is_empty()).then(|| Ok(Bytes::from(history))));
    Ok(Console { output: history.chain(until_closed(receiver)).boxed(), input })
}

pub(crate) fn logs(
    shared: &Shared,
    id: &InstanceId,
    request: LogRequest,
) -> Result<BoxStream<'static, Result<Bytes>>> {
    let since = request.since.and_then(|since| since.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let (history, receiver) = attach(shared, id, "logs", since_ms)?;
    let wanted = match request.tail_lines {
        Some(lines) => log::last_lines(&history, lines).to_vec(),
        None => history,
    };
    let history = stream::iter((!wanted.is_empty()).then(|| Ok(Bytes::from(wanted))));
    Ok(match receiver {
        Some(receiver) if request.follow => history.chain(until_closed(receiver)).boxed(),
        _ => history.boxed(),
    })
}

/// Echoes what was typed, and answers the lines that ask for something: `!count` prints how often memory was asked,
/// `!disk` how often the boot disk was, both counting this time.
fn hear(shared: &Shared, id: &InstanceId, typed: &[u8], line: &mut Vec<u8>) -> Result<()> {
    let mut live = shared.live.lock();
    let mut record = shared.settled(&mut live, id, "console")?;
    if !matches!(record.phase, Phase::Running { .. }) {
        return Err(not_running(id, "console"));
    }
    let print = |live: &mut crate::shared::Live, text: &[u8]| {
        shared.print(live, id, text).map_err(|e| DriverError::failed(id, "console", e))
    };
    print(&mut live, typed)?;
    for byte in typed {
        if !matches!(byte, b'\n' | b'\r') {
            if line.len() < MAX_LINE {
                line.push(*byte);
            }
            continue;
        }
        let answer = match line.as_slice() {
            b"!count" => {
                record.guest.memory += 1;
                format!("count={}\r\n", record.guest.memory)
            }
            b"!disk" => {
                record.guest.disk += 1;
                format!("disk={}\r\n", record.guest.disk)
            }
            _ => String::new(),
        };
        line.clear();
        if !answer.is_empty() {
            shared.save(&record, "console")?;
            print(&mut live, answer.as_bytes())?;
        }
    }
    Ok(())
}
