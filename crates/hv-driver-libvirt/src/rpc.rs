//! One connection to libvirtd: calls go out, answers are matched by their number, events are handed on.
//!
//! # Theory of operation
//! A message is its length, a header of six words and the arguments in XDR (libvirt's `virnetprotocol.x`). One task
//! reads; whoever calls writes, one at a time, and waits for the answer of his number. When the socket ends, which a
//! killed libvirtd does at once, everybody who waits is told.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::problem::{Outcome, Problem};
use crate::protocol::{Call, REMOTE};
use crate::xdr::{Reader, Writer};

/// The largest message (virnetprotocol.x: `VIR_NET_MESSAGE_MAX`).
const MAX_MESSAGE_BYTES: u32 = 32 << 20;
/// The length and the header of a message.
const HEADER_BYTES: u32 = 28;
/// How many events wait before the oldest connection task is held up.
const EVENT_QUEUE: usize = 1024;
/// How long most calls may take. libvirtd itself waits 30 s for another job of the same domain.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(40);

/// The kinds of message (virnetprotocol.x: `virNetMessageType`).
const CALL: u32 = 0;
const REPLY: u32 = 1;
const MESSAGE: u32 = 2;

type Answer = Result<Vec<u8>, (i32, String)>;
/// Who waits for which answer; `None` once the connection has ended.
type Pending = Mutex<Option<HashMap<u32, oneshot::Sender<Answer>>>>;

/// Something that libvirtd says by itself: which message, and what is in it.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) procedure: u32,
    pub(crate) body: Vec<u8>,
}

/// One connection. Dropping it ends it.
pub(crate) struct Connection {
    writer: tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    pending: Arc<Pending>,
    serial: AtomicU32,
    closed: watch::Receiver<bool>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Connection {
    /// Connects to a unix socket. Nothing is said yet.
    pub(crate) async fn connect(socket: &Path) -> Outcome<(Self, mpsc::Receiver<Event>)> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|e| Problem::Unreachable(format!("{} ({e})", socket.display())))?;
        let (reader, writer) = stream.into_split();
        Ok(Self::over(reader, writer))
    }

    fn over(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> (Self, mpsc::Receiver<Event>) {
        let pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, heard) = mpsc::channel(EVENT_QUEUE);
        let (close, closed) = watch::channel(false);
        let waiting = pending.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = read(reader, &waiting, &events).await {
                tracing::debug!(%error, "the connection to libvirtd ended");
            }
            // Whoever waits is told by the end of his channel; later calls find nothing.
            *waiting.lock() = None;
            let _ = close.send(true);
        });
        let writer = tokio::sync::Mutex::new(Box::new(writer) as Box<dyn AsyncWrite + Send + Unpin>);
        (Self { writer, pending, serial: AtomicU32::new(1), closed, reader }, heard)
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Returns when the connection has ended.
    pub(crate) async fn closed(&self) {
        let mut closed = self.closed.clone();
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Calls, and waits for the answer as long as calls usually take.
    pub(crate) async fn call(&self, call: Call, arguments: Writer) -> Outcome<Vec<u8>> {
        self.call_within(call, arguments, CALL_TIMEOUT).await
    }

    pub(crate) async fn call_within(
        &self,
        call: Call,
        arguments: Writer,
        timeout: Duration,
    ) -> Outcome<Vec<u8>> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let (answered, answer) = oneshot::channel();
        match self.pending.lock().as_mut() {
            Some(pending) => pending.insert(serial, answered),
            None => return Err(Problem::Disconnected(call.name)),
        };
        let work = async {
            let message = frame(call, serial, &arguments.finish());
            let mut writer = self.writer.lock().await;
            writer.write_all(&message).await.map_err(|_| Problem::Disconnected(call.name))?;
            drop(writer);
            match answer.await {
                Ok(Ok(body)) => Ok(body),
                Ok(Err((code, message))) => Err(Problem::Refused { call: call.name, code, message }),
                Err(_) => Err(Problem::Disconnected(call.name)),
            }
        };
        let outcome = tokio::time::timeout(timeout, work).await;
        outcome.unwrap_or_else(|_| {
            if let Some(pending) = self.pending.lock().as_mut() {
                pending.remove(&serial);
            }
            let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            Err(Problem::Timeout { what: format!("libvirtd's {}", call.name), timeout_ms })
        })
    }
}

fn frame(call: Call, serial: u32, body: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES.saturating_add(u32::try_from(body.len()).unwrap_or(u32::MAX));
    let header = Writer::new().u32(length).u32(call.program).u32(1).u32(call.number).u32(CALL);
    header.u32(serial).u32(0).fixed(body).finish()
}

async fn read(
    mut stream: impl AsyncRead + Unpin,
    pending: &Pending,
    events: &mpsc::Sender<Event>,
) -> std::io::Result<()> {
    loop {
        let length = stream.read_u32().await?;
        if !(HEADER_BYTES..=MAX_MESSAGE_BYTES).contains(&length) {
            return Err(std::io::Error::other(format!("a message of {length} bytes")));
        }
        let mut header = [0; 6];
        for word in &mut header {
            *word = stream.read_u32().await?;
        }
        let [program, _version, procedure, kind, serial, status] = header;
        let mut body = vec![0; (length - HEADER_BYTES) as usize];
        stream.read_exact(&mut body).await?;
        match kind {
            REPLY => {
                let waiting = pending.lock().as_mut().and_then(|pending| pending.remove(&serial));
                let answer = if status == 0 { Ok(body) } else { Err(refusal(&body)) };
                // Whoever asked may have given up.
                let _ = waiting.map(|waiting| waiting.send(answer));
            }
            MESSAGE if program == REMOTE => {
                // Nobody listening is no error.
                let _ = events.send(Event { procedure, body }).await;
            }
            // Streams are not used, and no other events are asked for.
            _ => {}
        }
    }
}

/// The code and the text of an error (`remote_error`).
fn refusal(body: &[u8]) -> (i32, String) {
    let mut reader = Reader::new(body);
    let mut read = || {
        let code = reader.i32()?;
        let _domain = reader.i32()?;
        Ok::<_, crate::xdr::Malformed>((code, reader.optional_text()?.unwrap_or_default()))
    };
    read().unwrap_or((0, "no reason that could be read".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::call;

    /// A libvirtd of one answer.
    async fn answer(peer: &mut tokio::io::DuplexStream, kind: u32, status: u32, body: &[u8]) {
        let length = peer.read_u32().await.unwrap();
        let mut message = vec![0; length as usize - 4];
        peer.read_exact(&mut message).await.unwrap();
        let header = Writer::new().u32(28 + body.len() as u32).fixed(&message[..12]).u32(kind);
        let reply = header.fixed(&message[16..20]).u32(status).fixed(body).finish();
        peer.write_all(&reply).await.unwrap();
    }

    fn pair() -> (Connection, mpsc::Receiver<Event>, tokio::io::DuplexStream) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (reader, writer) = tokio::io::split(near);
        let (connection, events) = Connection::over(reader, writer);
        (connection, events, far)
    }

    #[tokio::test]
    async fn answers_find_their_calls_and_refusals_keep_their_code() {
        let (connection, _events, mut far) = pair();
        let (answered, ()) = tokio::join!(
            connection.call(call::LIB_VERSION, Writer::new()),
            answer(&mut far, REPLY, 0, &[0, 0, 0, 0, 0, 0, 0, 9])
        );
        assert_eq!(answered.unwrap(), [0, 0, 0, 0, 0, 0, 0, 9]);
        let error = Writer::new().i32(42).i32(10).optional_text(Some("gone")).finish();
        let (refused, ()) = tokio::join!(
            connection.call(call::LIB_VERSION, Writer::new()),
            answer(&mut far, REPLY, 1, &error)
        );
        assert!(refused.unwrap_err().is_no_domain());
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_told_to_those_who_wait_and_to_those_who_come() {
        let (connection, _events, far) = pair();
        let call = connection.call(call::LIB_VERSION, Writer::new());
        let (outcome, ()) = tokio::join!(call, async { drop(far) });
        assert!(outcome.unwrap_err().is_away());
        connection.closed().await;
        assert!(connection.call(call::LIB_VERSION, Writer::new()).await.unwrap_err().is_away());
    }

    #[tokio::test]
    async fn a_message_of_an_impossible_length_ends_the_connection() {
        let (connection, _events, mut far) = pair();
        far.write_all(&[0xff; 28]).await.unwrap();
        connection.closed().await;
        assert!(connection.is_closed());
    }
}
